"""Sound for audio encoders: reading, features, batches, long recordings, pictures.

from mmadapt.tasks import audio

clip = audio.load_audio("dog.flac")                       # mono float32 at 16 kHz
features = audio.SpectrumFeatures.for_model(ast)          # AST's own log-mel filter bank
logits = ast(**features.batch([clip]).inputs).logits
clip.figure(features)                                     # the wave, and what the model sees
"""

from mmadapt.tasks.audio.augment import SpecAugment
from mmadapt.tasks.audio.batch import Batch
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.padding import fix_conformer_padding
from mmadapt.tasks.audio.positions import fit_positions
from mmadapt.tasks.audio.reading import load_audio
from mmadapt.tasks.audio.resample import resample
from mmadapt.tasks.audio.spectrum import SpectrumFeatures
from mmadapt.tasks.audio.splits import check_splits
from mmadapt.tasks.audio.wave import WaveFeatures
from mmadapt.tasks.audio.windows import over_windows, windows

__all__ = [
    "Audio",
    "Batch",
    "SpecAugment",
    "SpectrumFeatures",
    "WaveFeatures",
    "check_splits",
    "fit_positions",
    "fix_conformer_padding",
    "load_audio",
    "over_windows",
    "resample",
    "windows",
]
