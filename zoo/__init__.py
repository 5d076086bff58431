"""Zoo data: the manifest and the tiny weights, installed as `mmadapt._zoo_data`."""
