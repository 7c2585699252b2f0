"""The one table of the 41 systems: the listing, the gallery and the tests read it.

Titles and identifiers are those of the papers.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from rectiflow.errors import unknown


@dataclass(frozen=True)
class System:
    """One published system: what it is called, where it lives here and what runs it.

    Attributes:
        number: 1 to 41, in the order of the design.
        slug: its short name.
        title: the title of the work.
        arxiv: the identifier of the paper on arXiv.
        names: its public names, dotted, below `rectiflow`.
        summary: one line on what it does.
        recipes: the slugs of its runnable experiments.
        extra: the optional dependency set its recipes need besides `app`.
    """

    number: int
    slug: str
    title: str
    arxiv: str
    names: tuple[str, ...]
    summary: str
    recipes: tuple[str, ...]
    extra: str | None

    @property
    def rooms(self) -> tuple[str, ...]:
        """The packages its parts live in."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.names))

    @property
    def built(self) -> bool:
        """Whether every recipe of the system is part of this installation."""
        return all(recipe_exists(slug) for slug in self.recipes)


def recipe_module(slug: str) -> str:
    """The full name of the module that holds a recipe.

    Example:
        >>> recipe_module("rectified-flow")
        'rectiflow.recipes.rectified_flow'
    """
    return "rectiflow.recipes." + slug.replace("-", "_").replace(".", "_")


def recipe_exists(slug: str) -> bool:
    """Whether a recipe's module is part of this installation; nothing of it is imported."""
    return importlib.util.find_spec(recipe_module(slug)) is not None


def find(slug: str) -> System:
    """The system of this slug, or the one that a recipe of this slug belongs to.

    Raises:
        ValueError: no such slug; the closest one is suggested.

    Example:
        >>> find("apg").number, find("domain-transfer").slug
        (9, 'rectified-flow')
    """
    owners = {recipe: system for system in SYSTEMS for recipe in system.recipes}
    owners |= {system.slug: system for system in SYSTEMS}
    if slug not in owners:
        raise unknown("system", slug, owners)
    return owners[slug]


def bibtex(system: System) -> str:
    """A BibTeX entry with what the catalog knows: title, identifier and the year it encodes.

    Example:
        >>> print(bibtex(find("apg")).splitlines()[0])
        @misc{arxiv:2410.02416,
    """
    fields = {
        "title": "{" + system.title + "}",
        "year": f"20{system.arxiv[:2]}",
        "eprint": system.arxiv,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{system.arxiv}",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{arxiv:{system.arxiv},", *lines, "}"])


def _row(
    number: int,
    slug: str,
    arxiv: str,
    title: str,
    names: str,
    summary: str,
    *,
    recipes: str = "",
    extra: str | None = None,
) -> System:
    """A row of the table; names and recipes are separated by spaces, the recipe is the slug."""
    own = tuple((recipes or slug).split())
    return System(number, slug, title, arxiv, tuple(names.split()), summary, own, extra)


# fmt: off
SYSTEMS: tuple[System, ...] = (
    _row(1, "rectified-flow", "2209.03003",
         "Rectified Flow: Flow Straight and Fast",
         "flows.RectifiedPath flows.FlowModel flows.integrate training.FlowMatching "
         "distill.Reflow distill.generate_pairs flows.metrics.straightness "
         "flows.metrics.transport_cost",
         "Learn an ODE between any two data sets, then straighten it until one step is enough.",
         recipes="rectified-flow domain-transfer few-step-shootout"),
    _row(2, "rectified-diffusion", "2410.07303",
         "Rectified Diffusion: Straightness Is Not Your Need in Rectified Flow",
         "distill.RectifiedDiffusion flows.metrics.first_order_gap distill.ConsistencyDistillation",
         "Reflow any diffusion model in its own form, whole or in a few phases."),
    _row(3, "sd3-mmdit", "2403.03206",
         "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
         "flows.LogitNormal flows.Mode flows.CosMap flows.TimeShift flows.shift_times "
         "flows.SkipLayers nets.MMDiT interop.sd3.from_checkpoint",
         "Time samplers for training flows and the two-stream transformer of Stable Diffusion 3."),
    _row(4, "rfpp", "2405.20320",
         "Improving the Training of Rectified Flows",
         "flows.UShaped flows.PseudoHuber flows.PerceptualHuber flows.Reinterpolation "
         "flows.InvertedPairs interop.edm.from_edm",
         "One good reflow round: more training near both ends, robust losses, a diffusion start."),
    _row(5, "instaflow", "2309.06380",
         "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
         "distill.TextReflow distill.OneStepDistillation interop.diffusers.from_pipeline "
         "interop.diffusers.to_pipeline",
         "Straighten a guided, conditional teacher, then distil it to one step.",
         extra="diffusers"),
    _row(6, "slimflow", "2407.12718",
         "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
         "distill.AnnealingReflow distill.FlowGuidedDistillation",
         "Fewer steps and fewer parameters at once: a small student of a big teacher's pairs."),
    _row(7, "flowchef", "2412.00100",
         "FlowChef: Steering Rectified Flow Models in the Vector Field for Controlled Image "
         "Generation",
         "guidance.FlowChef guidance.LinearInverse guidance.edit_region images.degradations",
         "Steer a trained flow toward any differentiable cost without a backward pass through it."),
    _row(8, "rf-solver", "2411.04746",
         "Taming Rectified Flow for Inversion and Editing",
         "flows.solvers.RFSolver images.editing.invert images.editing.RFEdit",
         "A second-order step for faithful inversion, and edits that reuse what inversion saw."),
    _row(9, "apg", "2410.02416",
         "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models",
         "guidance.APG guidance.ClassifierFreeGuidance guidance.preset",
         "Guidance whose parallel part is damped, so that large scales do not burn the colours."),
    _row(10, "f-distill", "2502.15681",
         "One-step Diffusion Models with f-Divergence Distribution Matching",
         "distill.FDistill distill.DistributionMatching distill.divergences",
         "Match a one-step generator to its teacher under a divergence of your choice."),
    _row(11, "alignprop", "2310.03739",
         "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
         "align.AlignProp align.rewards",
         "Fine-tune a sampler by sending a reward's gradient back through its steps.",
         extra="lora"),
    _row(12, "visual-anagram-mtl", "2412.02693",
         "Diffusion-based Visual Anagram as Multi-task Learning",
         "guidance.Anagram guidance.views",
         "One image that shows something else when it is turned, flipped or cut up.",
         recipes="visual-anagram"),
    _row(13, "rrnet", "2403.20249",
         "Relation Rectification in Diffusion Model",
         "guidance.RelationRectifier guidance.ConditionRectifier guidance.RelationFitting "
         "guidance.PairContrastiveDenoising",
         "Teach a frozen text model who does what to whom with a tiny graph network."),
    _row(14, "pmrf", "2410.00418",
         "Posterior-Mean Rectified Flow: Towards Minimum MSE Photo-Realistic Image Restoration",
         "images.PMRF images.degradations",
         "Restore images: predict the mean, then flow from it to sharp images."),
    _row(15, "hcd", "2211.10643",
         "Downscaled Representation Matters: Improving Image Rescaling with Collaborative "
         "Downscaled Images",
         "images.HierarchicalCollaborativeDownscaling",
         "Thumbnails that look the same but scale back up better, by a few gradient steps."),
    _row(16, "recrecnet", "2301.01661",
         "RecRecNet: Rectangling Rectified Wide-Angle Images by Thin-Plate Spline Model and "
         "DoF-based Curriculum Learning",
         "images.RecRecNet images.warps.ThinPlateSpline",
         "Fill the rectangle again after an image was undistorted, by one smooth warp."),
    _row(17, "diffrate", "2305.17997",
         "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
         "compress.DiffRate",
         "Learn how many tokens each layer prunes and merges for a given budget."),
    _row(18, "dataset-distillation-cda", "2311.18838",
         "Dataset Distillation via Curriculum Data Synthesis in Large Data Era",
         "compress.CurriculumDataSynthesis",
         "A few synthetic images a class that stand in for the whole data set."),
    _row(19, "tract", "2410.23970",
         "TrAct: Making First-layer Pre-Activations Trainable",
         "optim.TrActLinear optim.TrActConv2d optim.apply_tract",
         "Train the first layer as if its outputs were the parameters."),
    _row(20, "diffgrad", "1909.11015",
         "diffGrad: An Optimization Method for Convolutional Neural Networks",
         "optim.DiffGrad",
         "Adam with friction where the gradient has stopped changing."),
    _row(21, "adamp", "2006.08217",
         "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
         "optim.AdamP optim.SGDP",
         "Drop the part of a step that only makes normalised weights longer."),
    _row(22, "sophia", "2305.14342",
         "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training",
         "optim.SophiaG optim.SophiaH",
         "Newton-like steps from a cheap diagonal Hessian, clipped per coordinate.",
         recipes="sophia optimizers-on-flows"),
    _row(23, "coordinate-clipping", "2306.00204",
         "Toward Understanding Why Adam Converges Faster Than SGD for Transformers",
         "optim.clip_coordinates_ optim.CoordinateClipped diagnose.directional_sharpness",
         "Measure the curvature along a step, and clip the few coordinates that cause it."),
    _row(24, "adadagrad", "2402.11215",
         "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
         "optim.AdAdaGrad optim.AdAdaGradNorm optim.NormTest optim.InnerProductTest "
         "optim.BatchSizeController",
         "Grow the batch when the gradient's variance asks for it."),
    _row(25, "opposing-signals", "2311.04163",
         "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
         "diagnose.OpposingSignals optim.SplitSGD",
         "Find the small groups of data whose losses swing against each other."),
    _row(26, "pixelwise-gradient-clipping", "2310.12474",
         "Enhancing High-Resolution 3D Generation through Pixel-wise Gradient Clipping",
         "optim.PixelwiseClip optim.score_distillation_loss",
         "Limit each pixel's gradient so that score distillation gives clean texture.",
         recipes="pixelwise-clipping"),
    _row(27, "sequential-gradient-coding", "2211.13802",
         "Sequential Gradient Coding For Straggler Mitigation",
         "distributed.GradientCode distributed.SelectiveRepetitionCode "
         "distributed.MultiplexedCode distributed.CodedTrainer",
         "Exact gradients from workers that may be late, coded over workers and rounds.",
         extra="ray"),
    _row(28, "diff2", "2302.03884",
         "DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex "
         "Distributed Learning",
         "distributed.DIFF2",
         "Private training whose noise shrinks with the length of the step.", extra="private"),
    _row(29, "reste", "2308.06689",
         "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for "
         "Binary Neural Networks Training",
         "compress.ReSTE compress.BinaryLinear compress.BinaryConv2d compress.binarize",
         "One-bit layers whose backward pass slides from smooth to exact."),
    _row(30, "gaqat", "2412.05551",
         "GAQAT: Gradient-Adaptive Quantization-Aware Training for Domain Generalization",
         "compress.LSQQuantizer compress.GAQAT compress.SAM compress.quantize_aware",
         "Three- and four-bit training that keeps accuracy on data from elsewhere."),
    _row(31, "odice", "2402.00348",
         "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal- "
         "gradient Update",
         "control.ODICE",
         "Learn to act from recorded data with value gradients that do not cancel.", extra="rl"),
    _row(32, "deep-conjugate-direction", "2205.10763",
         "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
         "solvers.DeepConjugateDirection solvers.conjugate_gradient",
         "Solve large grid systems with search directions proposed by a small network."),
    _row(33, "convex-relu-admm", "2201.01965",
         "Efficient Global Optimization of Two-Layer ReLU Networks: Quadratic-Time Algorithms "
         "and Adversarial Training",
         "estimators.ConvexReLUClassifier estimators.ConvexReLURegressor",
         "Train a two-layer network to its optimum without a learning rate."),
    _row(34, "attention-svm", "2308.16898",
         "Transformers as Support Vector Machines",
         "diagnose.AttentionSVM",
         "See which tokens attention will select, and by what margin."),
    _row(35, "robust-alternating-minimisation", "2302.11068",
         "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
         "estimators.MatrixCompletion",
         "Fill in a low-rank matrix by alternating regressions solved only roughly."),
    _row(36, "gradient-boosted-nn", "1909.12098",
         "Sequential Training of Neural Networks with Gradient Boosting",
         "estimators.BoostedNetClassifier estimators.BoostedNetRegressor",
         "Grow one shallow network a few neurons at a time by boosting."),
    _row(37, "physics-moe", "2402.13412",
         "Scaling Physics-Informed Hard Constraints with Mixture-of-Experts",
         "physics.ConstraintLayer physics.ExpertConstraints",
         "A layer that makes any output obey a differential equation, region by region."),
    _row(38, "orex", "2211.12886",
         "OReX: Object Reconstruction from Planar Cross-sections Using Neural Fields",
         "scenes.OReX scenes.slices",
         "A closed surface from a few planar slices.", extra="scenes"),
    _row(39, "progressive-radiance-distillation", "2408.07595",
         "Progressive Radiance Distillation for Inverse Rendering with Gaussian Splatting",
         "scenes.GaussianScene scenes.rasterize scenes.ProgressiveRadianceDistillation",
         "Splats that can be relit, learned by handing radiance over to physics.", extra="scenes"),
    _row(40, "direct2.5", "2311.15980",
         "Direct2.5: Diverse Text-to-3D Generation via Multi-view 2.5D Diffusion",
         "scenes.MultiViewFlow scenes.fuse_normals scenes.Direct25",
         "Consistent normal maps from four sides, fused into one textured mesh.", extra="scenes"),
    _row(41, "difftactile", "2403.08716",
         "DIFFTACTILE: A Physics-based Differentiable Tactile Simulator for Contact-rich Robotic "
         "Manipulation",
         "physics.tactile.TactileScene",
         "Simulate a soft fingertip on an object, with gradients of everything.", extra="warp"),
)
# fmt: on
