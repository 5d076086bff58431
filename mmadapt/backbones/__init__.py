"""Anatomies of the backbones mmadapt knows; tables, with no backbone library imported."""
