"""What the emulated kernels are given: the arguments structs of csrc/cuda and guarded memory."""

import ctypes

import torch

ELEMENTS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Operand(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("element", ctypes.c_int))


def _structure(name, fields):
    """A ctypes twin: p pointer, o Operand, q int64, i int, b bool, d double, f float."""
    kinds = {
        "p": ctypes.c_void_p,
        "o": Operand,
        "q": ctypes.c_int64,
        "i": ctypes.c_int,
        "b": ctypes.c_bool,
        "d": ctypes.c_double,
        "f": ctypes.c_float,
    }
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in pairs]})


Topk = _structure(
    "Topk",
    "logits:p rows:q vocab:q row_stride:q k:i slices:i stripes:i workspace:p token:q logprobs:p "
    "ids:p",
)
Mix = _structure(
    "Mix",
    "logits0:o logits1:o logits2:o logits3:o vocab0:q vocab1:q vocab2:q vocab3:q "
    "stride0:q stride1:q stride2:q stride3:q weights:p floor:p temperature:p seed:p position:p "
    "rows:q count:i k:i slices:i tiles:i workspace:p token:q scores:p ids:p logprobs:p log_norm:p "
    "kl:p",
)
Head = _structure(
    "Head",
    "hidden:o rows:q k:q width:q row_stride:q candidate_stride:q weight:o bias:o rewards:p",
)
Vocab = _structure(
    "Vocab",
    "weight:o vocab:q width:q weight_stride:q hidden:o hidden_stride:q ids:p rows:q k:q rewards:p",
)
Ratio = _structure(
    "Ratio",
    "logprobs:p rewards:p ids:p beta:p temperature:p seed:p position:p rows:q k:q do_sample:b "
    "slot:p logq:p",
)
Pair = _structure(
    "Pair",
    "chosen:p rejected:p rows:q width:q chosen_stride:q rejected_stride:q len_chosen:p "
    "len_rejected:p weights:p margin:p smoothing:d centering:d first:q loss:p grad_chosen:p "
    "grad_rejected:p",
)
Attention = _structure(
    "Attention",
    "q:p k_prefix:p v_prefix:p k_self:p v_self:p start:p length:p rows:p "
    "q_row:q q_slot:q q_head:q k_row:q k_head:q k_step:q v_row:q v_head:q v_step:q "
    "own_k_row:q own_k_slot:q own_k_head:q own_v_row:q own_v_slot:q own_v_head:q "
    "stores:q prefix:q window:q batch:i k:i heads:i group:i width:i splits:i scale:f softcap:f "
    "aligned:b partials:p peaks:p sums:p out:p",
)


class Buffers:
    """Guarded memory of one run."""

    def __init__(self, library, at_guard=False):
        self.library, self.at_guard, self.held = library, at_guard, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pointer in self.held:
            self.library.simt_free(pointer)

    def _allocate(self, size, offset=0, written=False):
        pointer = self.library.simt_allocate(size, -1 if self.at_guard else offset, written)
        self.held.append(pointer)
        return pointer

    def new(self, shape, dtype=torch.int64):
        """An output of that shape: (pointer, shape, dtype)."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._allocate(size, written=True), tuple(shape), dtype

    def read(self, output):
        pointer, shape, dtype = output
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        return torch.frombuffer(raw, dtype=dtype).clone().reshape(shape)

    def put(self, tensor):
        """A copy with the strides and the alignment of ``tensor``, and NaN in the gaps."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() == 0:
            return self._allocate(0)
        offset = tensor.storage_offset() * tensor.element_size() % 16
        pointer = self._allocate(span * tensor.element_size(), offset)
        raw = (ctypes.c_char * (span * tensor.element_size())).from_address(pointer)
        # By index, because elements of an expanded view share their memory.
        places = torch.arange(span).as_strided(tensor.shape, tensor.stride())
        torch.frombuffer(raw, dtype=tensor.dtype)[places.reshape(-1)] = tensor.reshape(-1)
        return pointer

    def operand(self, tensor):
        return Operand(self.put(tensor), ELEMENTS[tensor.dtype])
