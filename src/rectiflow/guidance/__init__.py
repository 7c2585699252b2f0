"""Bend a trained field while it is sampled: guidance, steering, views, relations."""

from rectiflow._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "anagram": ("Anagram",),
        "anti_segregation": ("AntiSegregation", "OverlapMeter", "overlap", "segregation"),
        "apg": ("APG", "projected_guidance", "rectify"),
        "attention_maps": ("text_attention",),
        "combination": ("Balance", "ClassSimilarity", "balanced_weights", "rectified"),
        "condition_rectifier": ("ConditionRectifier",),
        "costs": (
            "Classifier",
            "Cost",
            "Custom",
            "Decoded",
            "LinearInverse",
            "Masked",
            "StateCost",
        ),
        "flowchef": ("FlowChef",),
        "graph_attention": ("GraphAttention", "RelationalGraphAttention"),
        "multi_view": ("MultiViewField",),
        "pair_contrast": ("PairContrastiveDenoising",),
        "presets": ("preset",),
        "rectiflow.flows.guidance": ("ClassifierFreeGuidance", "SkipLayers"),
        "region_editing": ("RegionalField", "edit_region", "latent_mask"),
        "relation_fitting": ("RelationExamples", "RelationFitting", "fit_relation"),
        "relation_graph": ("RelationGraph", "directed_relation", "symmetric_relation"),
        "relation_prompts": ("RelationPrompts", "RelationShifts"),
        "relation_rectifier": ("RelationRectifier",),
        "relation_texts": ("RelationTexts", "encode_relation"),
        "specs": ("parse_guidance",),
        "view_scores": ("alignment", "concealment", "score_matrix"),
        "views": ("View", "assert_orthogonal", "compose", "parse_view"),
    },
)
