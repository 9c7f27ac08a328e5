"""Every message between processes: msgspec tagged structs over ZeroMQ, msgpack-encoded.

A message is one frame. Frozen dataclasses of `types` travel inside as they are. A frame that is no message of this
protocol, or whose numbers are out of range, raises `ProtocolError` where it is decoded; who sent it is ignored. A peer
that says it speaks another version of the protocol is answered with `Refused`.

By file: `worker` and `client` hold the messages of each pair of processes, `load` the numbers that placements are made
from, `history` the records that a worker keeps, `codec` how messages become frames.
"""

from nexusengine.wire.base import (
    MAX_CHANGES_IN_REPLY,
    MAX_DIGEST_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PENDING_IN_REPORT,
    MAX_STEPS_IN_REPLY,
    PROTOCOL_VERSION,
    Message,
    ProtocolError,
)
from nexusengine.wire.client import Abort, Cluster, Deltas, Hello, Refused, Submit
from nexusengine.wire.codec import (
    ToClient,
    ToRouterFromClient,
    ToRouterFromWorker,
    ToWorker,
    decode_for_client,
    decode_for_worker,
    decode_from_client,
    decode_from_worker,
    encode,
)
from nexusengine.wire.deltas import PlainDelta, Split, join_deltas, split_deltas
from nexusengine.wire.history import DebugQuery, DebugReply, RequestChange, RequestHistory, RequestRecord, StepRecord
from nexusengine.wire.load import (
    PendingPrefill,
    PerfSnapshot,
    PolicyTraits,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
    WorkerStatus,
)
from nexusengine.wire.worker import (
    Cancel,
    Dispatch,
    Leaving,
    PrefixDigest,
    Ready,
    RepeatPrefixes,
    Report,
    Reregister,
    Starting,
    WorkerDeltas,
    identity_of,
)

__all__ = [
    "MAX_CHANGES_IN_REPLY",
    "MAX_DIGEST_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_PENDING_IN_REPORT",
    "MAX_STEPS_IN_REPLY",
    "PROTOCOL_VERSION",
    "Abort",
    "Cancel",
    "Cluster",
    "DebugQuery",
    "DebugReply",
    "Deltas",
    "Dispatch",
    "Hello",
    "Leaving",
    "Message",
    "PendingPrefill",
    "PerfSnapshot",
    "PlainDelta",
    "PolicyTraits",
    "PrefixDigest",
    "ProtocolError",
    "Ready",
    "Refused",
    "RepeatPrefixes",
    "Report",
    "RequestChange",
    "RequestHistory",
    "RequestRecord",
    "Reregister",
    "Split",
    "Starting",
    "StepRecord",
    "Submit",
    "ToClient",
    "ToRouterFromClient",
    "ToRouterFromWorker",
    "ToWorker",
    "WorkerDeltas",
    "WorkerInfo",
    "WorkerLoad",
    "WorkerState",
    "WorkerStatus",
    "decode_for_client",
    "decode_for_worker",
    "decode_from_client",
    "decode_from_worker",
    "encode",
    "identity_of",
    "join_deltas",
    "split_deltas",
]
