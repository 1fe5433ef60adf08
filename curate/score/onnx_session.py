"""ONNX Runtime sessions, opened one way: a fixed thread count, a clear error, no model code executed.

Every ONNX scorer opens its model here, so that a worker with k sessions runs k x `threads` threads and not
k x cores, and so that a damaged file is a WeightsError in the plan. Refuses to guess an execution provider.
"""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from curate.errors import WeightsError

CPU = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"


def has_cuda() -> bool:
    """Whether this onnxruntime was built for CUDA; the plain wheel is not."""
    return CUDA in ort.get_available_providers()


def open_session(path: Path | str, *, threads: int = 1, providers: Sequence[str] = CPU) -> ort.InferenceSession:
    """Open the ONNX file with `threads` intra-op threads and one inter-op thread (results do not depend on load).

    Raises WeightsError when the file is missing or is not an ONNX model.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"no ONNX model at {file}; run `curate weights pull`")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    try:
        return ort.InferenceSession(str(file), options, providers=list(providers))
    except Exception as cause:  # onnxruntime raises a class of its own for each protobuf and graph fault
        raise WeightsError(f"{file} is not an ONNX model that this onnxruntime can run: {cause}") from cause
