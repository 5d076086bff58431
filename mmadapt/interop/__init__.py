"""Other people's adapter files, read into attachments and written from them."""

from __future__ import annotations

from mmadapt.interop.foreign import ForeignFile
from mmadapt.interop.llama_adapter import read_llama_adapter, write_llama_adapter
from mmadapt.interop.sam_checkpoint import read_med_sa, read_sam_med2d

__all__ = [
    "ForeignFile",
    "read_llama_adapter",
    "read_med_sa",
    "read_sam_med2d",
    "write_llama_adapter",
]
