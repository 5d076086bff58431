"""What `mmadapt demo` runs: whole jobs on backbones and data that come with the package."""
