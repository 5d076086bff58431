"""Speech recognition by CTC: training, decoding, error rates, long recordings and streams.

from mmadapt.tasks import asr

ctc = mm.load("tiny/ctc")
listen = asr.Recogniser(ctc)
mm.attach(ctc, mm.ConvAdapter(32), name="whisper")
mm.fit(ctc, listen.batches(clips, texts), loss=asr.CTCLoss(), lr=4.8e-2)
asr.compare(listen, {"whisper": (test_clips, test_texts), "known voices": source})
"""

from mmadapt.tasks.asr.alignment import Alignment, Errors, align
from mmadapt.tasks.asr.batches import Batches
from mmadapt.tasks.asr.clips import shipped
from mmadapt.tasks.asr.compare import Comparison, compare
from mmadapt.tasks.asr.decode import Greedy, Transcript, Word, greedy
from mmadapt.tasks.asr.long import Chunks, Stream, chunked_logits, transcribe_long
from mmadapt.tasks.asr.loss import CTCLoss, frames_needed
from mmadapt.tasks.asr.recogniser import Recogniser
from mmadapt.tasks.asr.score import Score, difference
from mmadapt.tasks.asr.vocabulary import Vocabulary
from mmadapt.tasks.asr.wording import normalise

__all__ = [
    "Alignment",
    "Batches",
    "CTCLoss",
    "Chunks",
    "Comparison",
    "Errors",
    "Greedy",
    "Recogniser",
    "Score",
    "Stream",
    "Transcript",
    "Vocabulary",
    "Word",
    "align",
    "chunked_logits",
    "compare",
    "difference",
    "frames_needed",
    "greedy",
    "normalise",
    "shipped",
    "transcribe_long",
]
