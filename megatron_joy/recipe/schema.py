"""The schema of a recipe, one pydantic model per section: what a key is called, its type, its range, its meaning.

Only single-field rules live here. What relates two keys is in `validate.py`; what follows from other keys is in
`derive.py`. Names are Hugging Face's where a `config.json` has the quantity, Megatron-core's otherwise
(docs/glossary.md has the table).
"""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A frozen table of a recipe that refuses keys it doesn't know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """The architecture (facts: arXiv 2604.03044 Table 1, dimensions of the released weights)."""

    vocab_size: PositiveInt = Field(description="Entries of the embedding and of the head; at least the tokenizer's.")
    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    num_hidden_layers: PositiveInt = Field(description="Decoder layers, the MTP layer not counted.")
    first_k_dense_replace: NonNegativeInt = Field(1, description="How many of the first layers have a dense MLP.")
    num_attention_heads: PositiveInt = Field(description="Attention heads of every layer.")
    q_lora_rank: PositiveInt = Field(description="Width of MLA's query latent.")
    kv_lora_rank: PositiveInt = Field(description="Width of MLA's key-value latent (what generation caches).")
    qk_nope_head_dim: PositiveInt = Field(description="Per head, query and key width without rotary position.")
    qk_rope_head_dim: PositiveInt = Field(
        description="Per head, query width with rotary position; the key's is shared."
    )
    v_head_dim: PositiveInt = Field(description="Per head, value width.")
    intermediate_size: PositiveInt = Field(description="Inner width of the dense MLPs (first layers and MTP).")
    moe_intermediate_size: PositiveInt = Field(description="Inner width of one expert.")
    n_routed_experts: PositiveInt = Field(description="Routed experts of a MoE layer.")
    num_experts_per_tok: PositiveInt = Field(description="Experts that each token is routed to (top-k).")
    n_shared_experts: PositiveInt = Field(
        1, description="Shared experts, run on every token, neither gated nor scaled."
    )
    routed_scaling_factor: PositiveFloat = Field(2.5, description="Factor on the normalised routing weights.")
    router_bias_update_rate: NonNegativeFloat = Field(
        1e-3, description="gamma of the aux-loss-free balance: bias += gamma * sign(mean load - load) after each step."
    )
    sequence_balance_factor: NonNegativeFloat = Field(
        0.0, description="alpha of the sequence-wise balance loss (arXiv 2412.19437, eq. 17); 0: none."
    )
    num_nextn_predict_layers: Literal[0, 1] = Field(1, description="Dense multi-token-prediction layers.")
    mtp_loss_factor: NonNegativeFloat = Field(0.1, description="Weight of the MTP loss beside the main loss.")
    rope_theta: PositiveFloat = Field(32_000_000.0, description="Base of the rotary position frequencies.")
    max_position_embeddings: PositiveInt = Field(131_072, description="Longest sequence the model is meant for.")
    rms_norm_eps: PositiveFloat = Field(1e-6, description="Epsilon of every RMSNorm.")
    initializer_range: PositiveFloat = Field(0.02, description="Standard deviation of initial weights.")
    backend: Literal["auto", "portable", "te"] = Field(
        "auto", description="Building blocks: plain torch (portable), Transformer Engine (te), or te where it runs."
    )


class LayoutSection(Section):
    """How the model and the batch are spread over processes.

    Two things have no key because only one choice is right: sequence parallelism is on when TP > 1 (Megatron-core's MoE
    layers refuse to train without), and optimizer state is sharded over DP x CP (ZeRO-1), so that all checkpoints have
    one form.
    """

    tensor_model_parallel_size: PositiveInt = Field(1, description="TP: each matrix is split over so many ranks.")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="PP: stages of layers.")
    virtual_pipeline_model_parallel_size: PositiveInt = Field(
        1, description="VPP: interleaved chunks of layers on each stage; 1 is plain 1F1B."
    )
    pipeline_layer_counts: list[PositiveInt] | None = Field(
        None, description="Decoder layers of each pipeline chunk, in model order (PP x VPP numbers); none means equal."
    )
    context_parallel_size: PositiveInt = Field(1, description="CP: each sequence is split over so many ranks.")
    expert_model_parallel_size: PositiveInt = Field(1, description="EP: routed experts are spread over so many ranks.")
    expert_tensor_parallel_size: PositiveInt = Field(1, description="ETP: each expert's matrices are split so often.")
    data_parallel_size: PositiveInt = Field(1, description="DP: replicas; world size is TP x CP x PP x DP.")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense weights and one sequence: TP x CP x PP."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def world_size(self) -> int:
        """Processes of the run: TP x CP x PP x DP."""
        return self.model_parallel_size * self.data_parallel_size

    @property
    def expert_model_parallel_world(self) -> int:
        """Ranks that hold one copy of the experts: EP x ETP x PP."""
        return self.expert_model_parallel_size * self.expert_tensor_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Replicas of each expert: world size over EP x ETP x PP."""
        return self.world_size // self.expert_model_parallel_world

    @property
    def pipeline_chunks(self) -> int:
        """Model chunks of the pipeline: PP x VPP."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size


Fp8Part = Literal["attention", "dense_mlp", "shared_experts", "routed_experts", "mtp_projection"]
FP8_PARTS: tuple[Fp8Part, ...] = get_args(Fp8Part)


class Fp8Section(Section):
    """FP8 matrix products. Embedding, head, router, norms and the attention core never have them."""

    recipe: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        "off",
        description="What shares a scale: a tensor (amaxes of earlier ones, or its own), 1x128 and 128x128 blocks, or "
        "1x32 (Blackwell).",
    )
    format: Literal["e4m3", "hybrid"] | None = Field(
        None, description="Gradients in E4M3 or in E5M2 (hybrid); derived: hybrid for whole tensors, else e4m3."
    )
    amax_history_len: PositiveInt | None = Field(
        None, description="Amaxes that a delayed scale looks back on; derived: 1024, with most_recent 1."
    )
    amax_compute_algo: Literal["max", "most_recent"] = Field(
        "max", description="Which amax of the history a delayed scale follows from."
    )
    margin: NonNegativeInt = Field(0, description="Powers of two that a delayed scale leaves above the amax.")
    high_precision: list[Fp8Part] = Field(
        default_factory=list, description="Parts whose products stay in params_dtype, in the MTP layer too."
    )
    emulate: bool = Field(
        False, description="Same rounding in plain torch, on any machine, slowly; off: Transformer Engine on a GPU."
    )


class PrecisionSection(Section):
    """Number formats of training. Router scores and losses are always fp32."""

    params_dtype: Literal["fp32", "bf16"] = Field("bf16", description="Weights and activations; masters stay fp32.")
    fp8: Fp8Section = Field(default_factory=Fp8Section)


class SourceEntry(Section):
    """One data source of a blend."""

    manifest: str = Field(description="Path of a folder of shards with manifest.json (relative to where you start).")
    weight: PositiveFloat = Field(1.0, description="Share of this source in the blend, in tokens, before normalising.")
    name: str | None = Field(None, description="What stages call this source; none: its manifest as written here.")
    max_epochs: PositiveFloat | None = Field(
        None, description="How often the run may read its text; a recipe that reads more is refused. None: no cap."
    )

    @property
    def label(self) -> str:
        """By what a blend names this source, and a run's ledger keeps count of it."""
        return self.name or self.manifest.rstrip("/")


class DataSection(Section):
    """What is read. The order of samples is a pure function of the recipe's seed, the blend and the manifests."""

    sequence_length: PositiveInt = Field(description="Tokens of a training sample.")
    train: list[SourceEntry] = Field(default_factory=list, description="Blend of sources to train on.")
    validation: list[SourceEntry] = Field(default_factory=list, description="Blend of sources to validate on.")
    tokenizer: str | None = Field(
        None, description="Folder with tokenizer.json; its hash must be the shards'. None: the manifest's own copy."
    )
    document_mask: bool = Field(
        True, description="Block-diagonal attention and positions that restart at each document; off: one long text."
    )


class OptimizerSection(Section):
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; docs/optimizer.md has the split and the sources.

    One learning rate and one weight decay serve both: Muon's updates are scaled to the size of AdamW's.
    """

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="The optimizer; muon: hidden matrices on Muon, embedding, head, norms, routers on AdamW."
    )
    betas: tuple[DecayRate, DecayRate] = Field(
        (0.9, 0.95), description="Decay rates of AdamW's two moments.", strict=False
    )
    eps: PositiveFloat = Field(1e-8, description="Added to the root of AdamW's second moment.")
    moments_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format in which AdamW keeps its two moments; an update is computed in fp32."
    )
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled weight decay of matrices.")
    clip_grad: NonNegativeFloat = Field(1.0, description="Global gradient norm to clip to; 0 turns clipping off.")
    muon_momentum: DecayRate = Field(0.95, description="mu of Muon's momentum: buffer = mu * buffer + gradient.")
    muon_nesterov: bool = Field(
        True, description="Orthogonalise gradient + mu * buffer; off: the momentum buffer itself."
    )
    muon_coefficients: Literal["moonlight", "quintic"] = Field(
        "moonlight", description="Newton-Schulz polynomials: one triple for all steps, or five (NVIDIA's default set)."
    )
    muon_steps: Annotated[int, Field(gt=0, le=20)] = Field(5, description="Newton-Schulz iterations of one update.")
    muon_update_rms: PositiveFloat = Field(
        0.2, description="RMS of an update before the learning rate; 0.2 is about AdamW's."
    )
    muon_dtype: Literal["bf16", "fp32"] | None = Field(
        None, description="Number format of the Newton-Schulz iterations; derived: precision.params_dtype."
    )


class ScheduleSection(Section):
    """Warmup, stable, decay (WSD)."""

    peak_lr: PositiveFloat = Field(4.2e-4, description="Learning rate of the stable part.")
    final_lr: NonNegativeFloat = Field(1.4e-4, description="Learning rate at the end of the decay.")
    warmup_steps: NonNegativeInt = Field(0, description="Linear from 0 to peak_lr.")
    decay_steps: NonNegativeInt = Field(0, description="Last steps of the run, from peak_lr to final_lr.")
    decay_shape: Literal["cosine", "linear"] = Field("cosine", description="Shape of the decay.")


class TrainSection(Section):
    """The loop."""

    steps: PositiveInt = Field(description="Optimizer steps of the run.")
    global_batch_size: PositiveInt = Field(description="Samples of one step, over all ranks.")
    micro_batch_size: PositiveInt = Field(1, description="Samples of one forward pass on one rank.")
    validation_interval: NonNegativeInt = Field(0, description="Steps between validations; 0: never.")
    validation_samples: PositiveInt = Field(64, description="Samples of one validation, always the same ones.")
    acceptance_passes: NonNegativeInt = Field(
        8, description="Passes of the model in which a validation counts what MTP drafts are accepted; 0: not counted."
    )
    log_interval: PositiveInt = Field(1, description="Steps between lines on the terminal; metrics.jsonl has all.")
    threads: NonNegativeInt = Field(0, description="CPU threads of a rank; 0: the machine's cores over local ranks.")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations recomputed in the backward pass: none, attention and experts, whole layers."
    )


class CheckpointSection(Section):
    """When checkpoints are written and which ones stay."""

    interval: NonNegativeInt = Field(0, description="Steps between checkpoints; 0: only at the end and on SIGTERM.")
    asynchronous: bool = Field(
        False, description="Write beside training: a step waits for a copy in host memory only, as large as the share."
    )
    keep_last: PositiveInt = Field(3, description="How many of the newest whole checkpoints to keep.")
    keep_every: NonNegativeInt = Field(
        0, description="Keep also each checkpoint whose step is a multiple of this; 0: none for that reason."
    )
    keep_best: NonNegativeInt = Field(
        0, description="Keep also so many checkpoints with the lowest validation loss; 0: none for that reason."
    )


class GuardsSection(Section):
    """What is watched while a run trains, and what is done when something is wrong (docs/guards.md)."""

    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="A NaN or infinite loss or gradient: stop the run, or leave that update out and go on."
    )
    spike: Literal["off", "warn", "skip", "rollback"] = Field(
        "warn",
        description="A spike: say so, leave that update out, or go back to a checkpoint and leave its samples out.",
    )
    spike_loss: NonNegativeFloat = Field(
        10.0, description="A loss so many robust deviations above the window's median is a spike; 0: not looked at."
    )
    spike_grad_norm: NonNegativeFloat = Field(
        20.0, description="A gradient norm so many robust deviations above the median is a spike; 0: not looked at."
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        128, description="Updates that a spike is held against; with fewer in the stage none is told."
    )
    spike_span: PositiveInt = Field(
        8, description="Updates whose samples a rollback leaves out: the spike's and those before it."
    )
    max_skipped_in_a_row: PositiveInt = Field(3, description="Updates left out one after the other that stop the run.")
    max_skipped: PositiveInt = Field(100, description="Updates left out in all that stop the run.")
    max_rollbacks: PositiveInt = Field(3, description="Times that a run goes back; the next spike stops it.")
    recheck_interval: NonNegativeInt = Field(
        0, description="Steps between updates that are computed twice and compared bit by bit; 0: never."
    )
    straggler_interval: NonNegativeInt = Field(
        100, description="Steps between looks at which rank is slow, and in what; 0: never."
    )
    straggler_factor: Annotated[float, Field(gt=1)] = Field(
        1.5, description="A rank that takes so many times the median of all ranks is slow."
    )
    statistics_interval: NonNegativeInt = Field(
        0, description="Steps between rows of statistics.jsonl: gradients and activations of each layer; 0: never."
    )
    ledger: str | None = Field(
        None, description="ledger.json of another run, whose left-out updates and samples this one repeats."
    )


NotifyKind = Literal["start", "stop", "error", "finish", "alarm"]


class NotifySection(Section):
    """Who is told what of a run, by a command or a webhook (docs/watching.md)."""

    command: list[str] = Field(
        default_factory=list, description="Program and its words, run without a shell; gets JSON on its input."
    )
    webhook_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Name of the environment variable that holds the webhook's address, which is a secret.",
    )
    on: list[NotifyKind] = Field(
        default_factory=lambda: list(get_args(NotifyKind)), min_length=1, description="What is told."
    )
    timeout_seconds: Annotated[float, Field(gt=0, le=60)] = Field(
        10.0, description="A command or an answer that takes longer is given up; training never waits for either."
    )

    @property
    def wanted(self) -> bool:
        """Whether anybody is to be told."""
        return bool(self.command) or self.webhook_env is not None


class RunSection(Section):
    """Where a run lives."""

    folder: str | None = Field(None, description="The run's folder; derived: runs/<name>.")
    expert_load_interval: PositiveInt = Field(
        1, description="Steps between rows of metrics.jsonl that have every expert's load (90 kB a row for 39 x 256)."
    )
    peak_tflops: PositiveFloat | None = Field(
        None, description="Dense bf16 TFLOP/s of a device, for MFU; none: the table of GPUs, unknown elsewhere."
    )
    wandb_project: str | None = Field(None, description="Project of Weights & Biases to send scalars to; none: no.")
    wandb_mode: Literal["online", "offline"] = Field(
        "online", description="Weights & Biases over the network, or into files of the run's folder to sync later."
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="First and last step of a window under torch's profiler; none: no window.", strict=False
    )
    profile_ranks: list[NonNegativeInt] = Field([0], description="Ranks that write the window's trace.")
    dead_expert_steps: NonNegativeInt = Field(
        100, description="Steps in a row without a token after which an expert raises an alarm; 0: never."
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events beside metrics.jsonl.")
    notify: NotifySection = Field(default_factory=NotifySection)
    last_stage: str = Field(
        "", description="Leave, as finished, after the last step of the stage of this name; empty: when all is done."
    )


class BlendEntry(Section):
    """A source's share of a stage's blend."""

    source: str = Field(description="A source of data.train: its name, or its manifest where it has no name.")
    weight: PositiveFloat = Field(1.0, description="Share in tokens, before normalising.")


class StageSection(Section):
    """One stage of a run: how long it is and what it changes. A key that is left out has the value in its description.

    The stages of the paper are in arXiv 2604.03044, 2.4.
    """

    name: str = Field(description="The stage's name.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    steps: PositiveInt | None = Field(None, description="Updates of the stage; give these or tokens.")
    tokens: PositiveInt | None = Field(None, description="Tokens of the stage: the fewest updates that reach them.")
    sequence_length: PositiveInt | None = Field(None, description="Tokens of a sample; none: data.sequence_length.")
    global_batch_size: PositiveInt | None = Field(
        None, description="Samples of a step, at the end of the ramp if there is one; none: train.global_batch_size."
    )
    ramp_from: PositiveInt | None = Field(
        None, description="Samples of the stage's first step, from where it grows to the last; none: no ramp."
    )
    ramp_increment: PositiveInt | None = Field(None, description="Samples by which the ramp grows each time.")
    micro_batch_size: PositiveInt | None = Field(None, description="Samples of a pass; none: train.micro_batch_size.")
    start_lr: NonNegativeFloat | None = Field(
        None, description="Learning rate that the stage goes out from; none: the end of the stage before."
    )
    end_lr: NonNegativeFloat | None = Field(None, description="Learning rate of the stage's last step.")
    lr_shape: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="The way from start_lr to end_lr; constant has no end_lr."
    )
    blend: list[BlendEntry] = Field(default_factory=list, description="Sources and shares; none: data.train as it is.")
    mtp_loss_factor: NonNegativeFloat | None = Field(
        None, description="Weight of the MTP loss, 0 leaves the MTP layer out; none: model.mtp_loss_factor."
    )
    rope_theta: PositiveFloat | None = Field(None, description="Base of rotary positions; none: model.rope_theta.")
    router_bias_update_rate: NonNegativeFloat | None = Field(
        None, description="gamma of the balance without auxiliary loss; none: model.router_bias_update_rate."
    )
    min_longest_document: PositiveInt | None = Field(
        None, description="Each source of the blend must have a document of so many tokens; none: not looked at."
    )


class Recipe(Section):
    """Everything about a run."""

    name: str = Field(description="The recipe's name.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = Field("", description="What this recipe is for, in a line.")
    seed: Seed = Field(1234, description="Initial weights and sample order follow from it.")
    model: ModelSection
    layout: LayoutSection = Field(default_factory=LayoutSection)
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    data: DataSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    guards: GuardsSection = Field(default_factory=GuardsSection)
    run: RunSection = Field(default_factory=RunSection)
    stages: list[StageSection] = Field(
        default_factory=list, description="What the run goes through, in order; none: one stage by [schedule]."
    )
