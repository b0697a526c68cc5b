"""Attacks that belong together, by one name that stands for all of them."""

SUITES: dict[str, str] = {
    # Croce and Hein, ICML 2020, arXiv:2003.01690: the standard version, parameter for parameter of its authors' code
    # (without its first step, which looks up what is wrong when clean).
    "autoattack": "apgd100,apgdt100,fab100,square5000",
    # The columns of Zi et al., ICCV 2021, arXiv:2108.07969: FGSM, PGD_SAT and PGD_TRADES, which are 20 steps and differ
    # in their length, CW-infinity, which is 30 steps on the margin, and AutoAttack. Read elsewhere, not in the paper:
    # 0.003, in TRADES' pgd_attack_cifar10.py; 2/255 and the 30 steps, whose length at 8/255 is 2/255 too, in two public
    # evaluation scripts that report the same columns.
    "rslad": "fgsm,pgd20@2/255,pgd20@0.003,pgd30-margin,autoattack",
    # For files on a device: two ways to climb, and one attack without gradients, so that masked ones show. On an
    # honest int8 file that last one adds nothing, and neither does pgd20 (benchmarks/suite.py).
    "deployed": "pgd20-margin,apgdt10,nes500",
}
