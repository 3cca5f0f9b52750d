"""Configuration: schema, checks, overrides, composition, run key."""
