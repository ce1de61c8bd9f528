"""The tasks that a config may name."""

from __future__ import annotations

import enum


class TaskType(str, enum.Enum):
    """What a model is trained for; wherever one is given, its name as a string does as well."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


TASK_TYPES = tuple(task.value for task in TaskType)
