"""The sections of settings: names, defaults, help, checks. `config.py` puts them together.

Nothing here imports JAX, so that a command can show help or an error at once.
"""

from dllm_jax.settings.base import (
    Section as Section,
)
from dllm_jax.settings.base import (
    at_least as at_least,
)
from dllm_jax.settings.base import (
    check_fields as check_fields,
)
from dllm_jax.settings.base import (
    is_text as is_text,
)
from dllm_jax.settings.base import (
    numbers as numbers,
)
from dllm_jax.settings.base import (
    setting as setting,
)
from dllm_jax.settings.base import (
    token_ids as token_ids,
)
from dllm_jax.settings.combinations import (
    BLOCKS as BLOCKS,
)
from dllm_jax.settings.combinations import (
    BLOCKS_CACHES as BLOCKS_CACHES,
)
from dllm_jax.settings.combinations import (
    CACHES as CACHES,
)
from dllm_jax.settings.combinations import (
    DREAM_ORDERS as DREAM_ORDERS,
)
from dllm_jax.settings.combinations import (
    FAST_DLLM as FAST_DLLM,
)
from dllm_jax.settings.combinations import (
    ONE_GRID as ONE_GRID,
)
from dllm_jax.settings.combinations import (
    POLICIES as POLICIES,
)
from dllm_jax.settings.combinations import (
    POLICY_FITS as POLICY_FITS,
)
from dllm_jax.settings.combinations import (
    STOPS as STOPS,
)
from dllm_jax.settings.combinations import (
    Fits as Fits,
)
from dllm_jax.settings.combinations import (
    blocks_table as blocks_table,
)
from dllm_jax.settings.combinations import (
    check_combination as check_combination,
)
from dllm_jax.settings.combinations import (
    policy_table as policy_table,
)
from dllm_jax.settings.general import (
    BenchSettings as BenchSettings,
)
from dllm_jax.settings.general import (
    DecodeSettings as DecodeSettings,
)
from dllm_jax.settings.general import (
    DistributedSettings as DistributedSettings,
)
from dllm_jax.settings.general import (
    InputSettings as InputSettings,
)
from dllm_jax.settings.general import (
    MeshSettings as MeshSettings,
)
from dllm_jax.settings.general import (
    ModelSettings as ModelSettings,
)
from dllm_jax.settings.general import (
    OutputSettings as OutputSettings,
)
from dllm_jax.settings.general import (
    PlanSettings as PlanSettings,
)
from dllm_jax.settings.general import (
    TokenizerSettings as TokenizerSettings,
)
from dllm_jax.settings.general import (
    block_schedule as block_schedule,
)
from dllm_jax.settings.policies import (
    AdaptiveSettings as AdaptiveSettings,
)
from dllm_jax.settings.policies import (
    ApdSettings as ApdSettings,
)
from dllm_jax.settings.policies import (
    CladSettings as CladSettings,
)
from dllm_jax.settings.policies import (
    CreditSettings as CreditSettings,
)
from dllm_jax.settings.policies import (
    DawnSettings as DawnSettings,
)
from dllm_jax.settings.policies import (
    DicoSettings as DicoSettings,
)
from dllm_jax.settings.policies import (
    EbSettings as EbSettings,
)
from dllm_jax.settings.policies import (
    EntropyThresholdSettings as EntropyThresholdSettings,
)
from dllm_jax.settings.policies import (
    EotSettings as EotSettings,
)
from dllm_jax.settings.policies import (
    FactorSettings as FactorSettings,
)
from dllm_jax.settings.policies import (
    FilterSettings as FilterSettings,
)
from dllm_jax.settings.policies import (
    FrechetSettings as FrechetSettings,
)
from dllm_jax.settings.policies import (
    HierarchySettings as HierarchySettings,
)
from dllm_jax.settings.policies import (
    KlassSettings as KlassSettings,
)
from dllm_jax.settings.policies import (
    Learn2pdSettings as Learn2pdSettings,
)
from dllm_jax.settings.policies import (
    LocalLeapSettings as LocalLeapSettings,
)
from dllm_jax.settings.policies import (
    PipelinedSettings as PipelinedSettings,
)
from dllm_jax.settings.policies import (
    R2Settings as R2Settings,
)
from dllm_jax.settings.policies import (
    SettledSettings as SettledSettings,
)
from dllm_jax.settings.policies import (
    SlidingSettings as SlidingSettings,
)
from dllm_jax.settings.policies import (
    ThresholdSettings as ThresholdSettings,
)
from dllm_jax.settings.policies import (
    VerifierSettings as VerifierSettings,
)
from dllm_jax.settings.policies import (
    WinoSettings as WinoSettings,
)
