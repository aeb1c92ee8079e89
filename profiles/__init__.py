"""Device profiles, one TOML file each; `lvlm_edge.exporter.profiles` reads them."""
