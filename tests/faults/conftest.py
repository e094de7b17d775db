"""The short form, without what is marked `long`, and what the cases share."""

import pytest


def pytest_collection_modifyitems(config, items):
    if config.pluginmanager.has_plugin("faults"):
        return
    kept = [item for item in items if not item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_generate_tests(metafunc):
    if "attempt" in metafunc.fixturenames:
        plugin = metafunc.config.pluginmanager.get_plugin("faults")
        metafunc.parametrize("attempt", range(plugin.tries if plugin else 1))


@pytest.fixture
def note(record_property):
    """Adds a line to the long form's log."""
    return lambda text: record_property("note", text)


@pytest.fixture
def each(record_property):
    """A function that tries something with each item, and counts; fails if one of them fails."""

    def call(items, function):
        failed = []
        for item in items:
            try:
                record_property("note", function(item) or f"{item}: as documented")
            except AssertionError as error:
                record_property("note", f"{item}: FAILED")
                failed.append(error)
        record_property("tries", (len(items), len(items) - len(failed)))
        if failed:
            raise failed[0]

    return call
