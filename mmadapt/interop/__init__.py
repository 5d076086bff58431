"""Other people's adapter files, read into attachments and written from them."""

from __future__ import annotations

from mmadapt.interop.adapterhub import read_adapterhub
from mmadapt.interop.foreign import ForeignFile
from mmadapt.interop.llama_adapter import read_llama_adapter, write_llama_adapter
from mmadapt.interop.mms import mms_adapters, read_mms, write_mms
from mmadapt.interop.mms_layout import MMSFile, mms_file
from mmadapt.interop.peft import read_peft
from mmadapt.interop.peft_writing import write_peft
from mmadapt.interop.sam_checkpoint import read_med_sa, read_sam_med2d
from mmadapt.interop.three_d_sam import read_three_d_sam

__all__ = [
    "ForeignFile",
    "MMSFile",
    "mms_adapters",
    "mms_file",
    "read_adapterhub",
    "read_llama_adapter",
    "read_med_sa",
    "read_mms",
    "read_peft",
    "read_sam_med2d",
    "read_three_d_sam",
    "write_llama_adapter",
    "write_mms",
    "write_peft",
]
