"""Diffusers pipelines as flow models, and flow models as stock diffusers pipelines."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "clip_text": ("ClipText", "clip_of"),
        "exporting": ("to_pipeline",),
        "families": ("open_pipeline",),
        "latents": ("decode_latents", "encode_images"),
        "loading": ("from_pipeline",),
        "networks": ("PipelineNet",),
        "prompt_files": ("read_prompts",),
        "prompt_lengths": ("check_prompts",),
        "prompt_table": ("PromptTable",),
        "prompts": ("encode_prompts", "with_prompts"),
        "readings": ("AnalyticReading", "FlowReading", "TableReading"),
        "rf_solver_scheduler": ("RFSolverScheduler",),
        "scheduling": ("stock_times",),
        "token_spans": ("concept_tokens",),
    },
)
