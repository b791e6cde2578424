"""The five embedded domains: real images out of packages, one module each."""
