"""The demo: a pass key in a long text, asked for with the full cache and with each policy."""

from kvpress.demo.passkey import PasskeyTask, make_task
from kvpress.demo.run import DemoPlan, DemoResult, chosen_policies, plan_demo, run_demo
from kvpress.demo.table import demo_table, verdict

__all__ = [
    "DemoPlan",
    "DemoResult",
    "PasskeyTask",
    "chosen_policies",
    "demo_table",
    "make_task",
    "plan_demo",
    "run_demo",
    "verdict",
]
