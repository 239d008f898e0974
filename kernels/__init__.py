"""Triton kernels of dispatch, combine and permute for GPUs, one operator a file; installs as `moe_a2a.kernels`.

    signals        flags, counters, waits: the only place with system-scope atomics and inline PTX
    bad_input      what to say of wrong ids, scales and weights
    casts          roundings that are the same on a GPU and in Triton's interpreter
    formats        what rows and scales look like, as numbers
    launch         the way to the driver, once a kernel is compiled
    dispatch_send  -> dispatch_recv -> (experts) -> [weights_push] -> combine_send -> combine_recv
    dispatch       dispatch_send and dispatch_recv in one launch; combine: combine_send and combine_recv
    wait_times     in front of a wait, if somebody asks how long it is
    normal_tables  what DeepEP's normal mode tells about a routing
    permute        -> (experts) -> unpermute, without communication

Kernels of dispatch and combine take a `moe_a2a.gpu.layout.Layout` as their compile-time constant L. Importing this
package needs no Triton; importing a kernel does. Set TRITON_INTERPRET=1 before Triton is imported to run them on a CPU.
"""
