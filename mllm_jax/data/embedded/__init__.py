"""The five embedded domains: real images from packages, one module each."""
