"""The structs of src/kernels.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

F32, BF16, INT8, Q4 = range(4)
STORE, ADD, GATED = range(3)


class Weight(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("minimum", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("kind", c_int32),
        ("int8_activations", c_int32),
    ]


class Linear(ctypes.Structure):
    _fields_ = [
        ("weight", POINTER(Weight)),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("rows", c_int64),
        ("norm", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("eps", c_float),
        ("finish", c_int32),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("block_bytes", c_int64),
        ("token_bytes", c_int64),
        ("head_bytes", c_int64),
        ("kind", c_int32),
        ("block_size", c_int32),
    ]


class Embed(ctypes.Structure):
    _fields_ = [("weight", POINTER(Weight)), ("ids", c_void_p), ("out", c_void_p), ("rows", c_int64)]


class Norm(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("dim", c_int64),
        ("eps", c_float),
    ]


class Largest(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("out", c_void_p), ("rows", c_int64), ("columns", c_int64)]


class Take(ctypes.Structure):
    _fields_ = [("x", c_void_p), ("places", c_void_p), ("out", c_void_p), ("rows", c_int64), ("columns", c_int64)]


class RotateStore(ctypes.Structure):
    _fields_ = [
        ("qkv", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("cache", Cache),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("cache", Cache),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("lengths", c_void_p),
        ("starts", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("scale", c_float),
    ]


class Call(ctypes.Structure):
    _fields_ = [("arguments", c_void_p), ("kind", c_int64)]


KINDS: dict[type[ctypes.Structure], int] = {
    Linear: 0,
    Embed: 1,
    Norm: 2,
    RotateStore: 3,
    Attention: 4,
    Largest: 5,
    Take: 6,
}
"""NexCallKind of each struct that is an argument."""
