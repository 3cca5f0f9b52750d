"""RULER (arXiv 2404.06654): 13 generated tasks of retrieval, tracing, counting and questions, at any length."""

from hipexp.suites.ruler.generate import make_rows
from hipexp.suites.ruler.suite import Ruler
from hipexp.suites.ruler.tasks import EDITION, SEED, SUBTASKS, TASKS, check_subtasks

__all__ = ["EDITION", "SEED", "SUBTASKS", "TASKS", "Ruler", "check_subtasks", "make_rows"]
