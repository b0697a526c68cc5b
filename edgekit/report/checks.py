"""The checks of the attack itself, explained: what each tests, what a failure usually means, and the usual cure.

Failures and cures follow Pintor et al., "Indicators of Attack Failure", NeurIPS 2022, arXiv:2106.09947; masking follows
Athalye et al., ICML 2018, arXiv:1802.00420; the planted example is Zimmermann et al., NeurIPS 2022, arXiv:2206.13991.
"""

from typing import NamedTuple


class Explanation(NamedTuple):
    title: str
    tests: str
    means: str
    cure: str


EXPLAINED = {
    "epsilon_zero_is_clean": Explanation(
        "No room, no success",
        "With epsilon 0 the attack may change nothing, so robust accuracy must equal clean accuracy.",
        "The attack counts successes that are none, or judges through other preprocessing than the clean accuracy.",
        "Mend the implementation: count a sample only where the judge itself answers wrongly to the image returned.",
    ),
    "huge_epsilon_fools": Explanation(
        "All room, every success",
        "With an epsilon that allows any image, the attack must bring robust accuracy to 0 %.",
        "An unconstrained attack that fails is stopped by its gradients and not by the model (Pintor's indicator 6, "
        "the unconstrained attack failure): they are flat, noisy or point nowhere.",
        "Change the loss (margin in place of cross-entropy, scores before the softmax), or replace the layer that "
        "hides its gradient by a smooth one in the backward pass (BPDA).",
    ),
    "steps_increase_loss": Explanation(
        "Loss rises with steps",
        "Along the attack's path the loss of the judge must rise on most samples.",
        "The steps do not climb: the step is too long, the gradient is noise, or it belongs to another function than "
        "the one that is judged (Pintor's indicator 4, incomplete optimization).",
        "Shorten the step or let it adapt (Auto-PGD); average gradients over the noise of a random model (EOT); check "
        "the sign of the loss and the twin's fidelity.",
    ),
    "more_steps_change_little": Explanation(
        "The attack has converged",
        "More steps and restarts must not find many more samples than the attack did.",
        "The attack was stopped before it had converged, so that the number is too high (Pintor's indicator 4, "
        "incomplete optimization).",
        "More steps, more restarts, an adaptive step; report the figure of the longer attack.",
    ),
    "gradients_reach_the_input": Explanation(
        "Gradients reach the input",
        "The loss must have a gradient at the input that is finite and not zero, on most samples.",
        "Gradients are unavailable (Pintor's indicator 1): a saturated softmax, a rounding without a straight-through "
        "estimator, a clamp in the gradient's path, or preprocessing that cannot be differentiated.",
        "Take the scores before the softmax and the margin loss; replace the step that has no gradient by the identity "
        "in the backward pass (BPDA); keep clamps outside the graph.",
    ),
    "gradient_free_is_weaker": Explanation(
        "Gradients beat guessing",
        "An attack that sees scores only must not find significantly more samples than one that follows gradients.",
        "The gradients mislead: the model masks them, or the loss suits it badly.",
        "Adapt the attack to the model: another loss, BPDA, or a gradient estimated from the scores. Until then the "
        "gradient-free figure is the one to report.",
    ),
    "transfer_is_weaker": Explanation(
        "Own gradients beat borrowed ones",
        "Images made on another model must not fool the file significantly more often than those made on its own copy.",
        "The file's own gradients are worse than a stranger's, the classic sign of masking; or the attack optimizes a "
        "copy that the file does not follow (Pintor's indicator 5, transfer failure).",
        "Check the twin against the file; attack from both sources, as here, and report the worst case.",
    ),
    "same_answer_twice": Explanation(
        "Asked twice, answered alike",
        "The same images are asked for twice and must get the same scores, up to rounding.",
        "The model or its runtime is random, or answers depend on the batch: predictions are unstable (Pintor's "
        "indicator 2), and one lucky answer is no robustness.",
        "Fix the seed and the batch; where the noise is meant as a defence, attack its expectation (EOT) and judge by "
        "many answers.",
    ),
    "fooled_replayed": Explanation(
        "Successes can be replayed",
        "A freshly opened file must answer to the images returned as it did during the attack.",
        "The attack returned another image than the one that succeeded, or state was carried from one answer to the "
        "next (Pintor's indicator 3, silent success, is its mirror: a success that was found and not returned).",
        "Return the first image that fooled the judge, and close what keeps state between answers.",
    ),
    "robust_accuracy_did_not_rise": Explanation(
        "Nothing was gained by export",
        "The file must not withstand significantly more samples than the float student that it was made from.",
        "Rounding cannot make a model robust: it hides gradients and moves scores onto a grid, and so weakens "
        "the attack.",
        "Follow the float student's gradients as well as the twin's, use the margin loss and a gradient-free attack, "
        "and look at the twin's fidelity.",
    ),
    "twin_fidelity": Explanation(
        "The copy is faithful",
        "The differentiable copy must decide as the file does on nearly all clean and adversarial images.",
        "Gradients are taken from another function than the one under attack (Pintor's indicator 5, transfer failure).",
        "Do not trust the twin alone: the float student's gradients and the gradient-free attacks carry the verdict. "
        "Look for an operator whose rounding or layout differs.",
    ),
    "planted_example_found": Explanation(
        "The planted example is found",
        "In a copy of the model, altered so that an adversarial image certainly exists, the attack must find one.",
        "The attack misses what is there, whatever the reason; its silence about the real file then says nothing.",
        "A stronger attack: more steps and restarts, another loss, a gradient-free one; then plant again.",
    ),
}
