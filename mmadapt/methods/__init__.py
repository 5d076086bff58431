"""The layers that adapters build; each file reads like its papers' method sections."""
