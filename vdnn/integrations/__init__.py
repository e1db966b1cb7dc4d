"""vdnn inside other libraries' training loops. Each module imports its library, and nothing else does.

    vdnn.integrations.trainer     a callback for Hugging Face's Trainer (and TRL's, which are Trainers)

A loop of one's own, Accelerate's, DDP's and FSDP2's needs no integration: `vdnn.wrap(model)` once, before the first
step, on the module itself (under DDP: the module given to it; with FSDP2: after `fully_shard`). See `examples/`.
"""
