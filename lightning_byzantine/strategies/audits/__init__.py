"""Audits: a worker's step is computed once more by all other ranks, and compared with what it has sent.

- ``audits`` is the sequence: announce, draw the step, exchange, compute, vote.
- ``window`` draws the step of an audit when the worker can't know it any more.
- ``captured_step`` keeps what a step depends on: batches, random state, buffers.
- ``sent_rows`` keeps what the worker has sent, and what that follows.
- ``parcel`` sends tensors to ranks that check them before use.
- ``replay`` computes the gradients once more, without a trace.
- ``residual`` compares them with what was sent.
- ``statement`` is what an auditor says, and what follows from all that they say.
- ``verdict`` is the outcome.
"""
