"""Whether this installation can do its work, and what to do where it cannot: ``ats-stream doctor``.

What is looked at is imported and tried in another process (:mod:`~ats_stream.doctor.probe`), so that a
package that is broken, even one that kills the interpreter, becomes a finding like any other.
"""

from ats_stream.doctor.examination import examine
from ats_stream.doctor.finding import Finding, State

__all__ = ["Finding", "State", "examine"]
