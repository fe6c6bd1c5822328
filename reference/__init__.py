"""DeepSeek-V4 in plain `jnp`: FP32, no cache, one op per file, as obvious as it can be made.

Nothing is re-exported: call an op through its module (`from reference import mhc_post`, then
`mhc_post.mhc_post(...)`), as the model itself does, so that a test can replace one op and see the
comparison fail. Section numbers refer to the implementation specification of DeepSeek-V4
(model.md).
"""
