"""The config fields and key tables of networks that several families share."""
