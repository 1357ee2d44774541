"""Prompts that the demo's training text never contains: what the check and the tests ask.

Owns the lists only. `check_styles.py` verifies that none of them can be found in the corpus.
"""

UNSEEN_PROMPTS: tuple[str, ...] = (
    "The old fisherman looked at the sky and",
    "Once upon a time a very small whale",
    "In the middle of the night the children",
    "Last Sunday the baker and the fox",
    "Nobody knew why the bells",
    "My cousin keeps a parrot that",
    "After the long winter",
    "On the road to the market I met",
    "If you listen carefully in the forest,",
    "The little boy opened the door and",
)

UNSEEN_CHATS: tuple[str, ...] = (
    "Tell me a story about a shy lighthouse.",
    "What would the fox and the owl talk about?",
    "My boots are wet. What now?",
    "How do I make a good soup for ten people?",
    "What do you know about trains in Spain?",
    "Could you describe your village to a stranger?",
    "Where do the bees go when it rains?",
    "Who in the village could repair my watch?",
    "I lost my hat in the storm.",
    "What is the best time to pick apples?",
)
