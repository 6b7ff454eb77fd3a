"""Sums on several machines meet the sums that they belong to, in whatever order MLX computes."""

from __future__ import annotations

import pytest

from .processes import run

pytestmark = pytest.mark.slow


def test_a_question_does_not_overtake_what_is_pending(tmp_path):
    run(tmp_path, 2, "pending")


def test_a_token_is_exchanged_after_what_it_is_made_of(tmp_path):
    run(tmp_path, 2, "only_the_token")


def test_what_one_process_does_not_need_reaches_the_other(tmp_path):
    run(tmp_path, 2, "unread")
