"""What went wrong with the connections that this process has dialled, for `admin report`."""

from __future__ import annotations

from collections import Counter

tally: Counter[str] = Counter()
"""Name -> how often since the process started:
connections_lost      broken, or given up
connections_silent    of these: no sign of life while calls waited
reconnects            made again after one was lost
calls_timed_out       not answered within the request's deadline
calls_interrupted     given up because the program was told to stop
calls_repeated        sent again, as the answer was lost with its connection
leases_lapsed         no word from the master for a lease: all that was cached was dropped
sessions_lost         given up by the master, and taken up anew
calls_unknown         changes whose answer was lost for good: they may have been done
"""
