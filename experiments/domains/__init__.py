"""The embedded visual domains: their construction, sources and licences."""
