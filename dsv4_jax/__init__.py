"""DeepSeek-V4 inference in JAX and Flax Linen.

Importing the package does no work on any device.
"""

from dsv4_jax.cache import Cache as Cache
from dsv4_jax.cache import rewind as rewind
from dsv4_jax.checkpoint import bundled_checkpoint as bundled_checkpoint
from dsv4_jax.checkpoint import from_checkpoint as from_checkpoint
from dsv4_jax.checkpoint.errors import CheckpointError as CheckpointError
from dsv4_jax.config import ModelConfig as ModelConfig
from dsv4_jax.generate import Completion as Completion
from dsv4_jax.generate import TokenEvent as TokenEvent
from dsv4_jax.generate import decode_step as decode_step
from dsv4_jax.generate import generate as generate
from dsv4_jax.generate import prefill as prefill
from dsv4_jax.generate import stream as stream
from dsv4_jax.model import DeepseekV4 as DeepseekV4
from dsv4_jax.precision import Precision as Precision
from dsv4_jax.sampling import Sampled as Sampled
from dsv4_jax.sampling import SamplingParams as SamplingParams
from dsv4_jax.sampling import sample as sample
from dsv4_jax.sampling import step_keys as step_keys
from dsv4_jax.session import Session as Session
from dsv4_jax.version import __version__ as __version__
