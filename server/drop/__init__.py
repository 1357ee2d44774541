"""LoRA-drop: the layers of an adapter that matter on given prompts, and the smaller adapter that has these alone.

Zhou, Lu, Xu et al. 2024, "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", arXiv:2402.07721.
"""
