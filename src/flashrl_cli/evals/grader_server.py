"""Imported by the process that graders are forked from, and nowhere else: importing it prepares that process."""

from flashrl_cli.evals.graders import prepare

prepare()
