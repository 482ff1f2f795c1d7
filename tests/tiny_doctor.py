"""What ``latentlm doctor`` found, by what was looked at."""

from latentlm_core.workflows.doctor import doctor


def found(target: str | None) -> dict[str, tuple[str, str]]:
    """State and message by what was looked at."""
    result = doctor(target=target)
    findings = result.details["findings"]
    assert len(result.figures) == len(findings), "each has a name of its own"
    states = [finding["state"] for finding in findings]
    assert result.details["faults"] == states.count("fault")
    assert result.details["warnings"] == states.count("warning")
    return {f["what"]: (f["state"], f["message"]) for f in findings}


def faults(target: str) -> dict[str, str]:
    return {what: message for what, (state, message) in found(target).items() if state == "fault"}


def warnings(target: str) -> dict[str, str]:
    return {what: text for what, (state, text) in found(target).items() if state == "warning"}
