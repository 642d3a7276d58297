"""Deliver email into Zulip without losing any of it.

One resident service takes a mail (from Postfix's pipe(8) transport, an IMAP inbox, the
quarantine, Zulip's own file of failed mail), decides about its address, waits for Zulip's
rate limit, hands it over, and writes the outcome into its journal.
It needs Python 3.10 or later and the standard library only; polling needs
python3-imap-tools besides.

Modules, one job each:

deliver             the command that Postfix runs for each mail: asks the service
submission          how a client asks the service; client: the same for poller and operators
service             the resident process: its socket, its requests, its end
policy              what smtpd is told before it accepts a mail; milter: the same by its header;
                    questions: whether Zulip knows an address; backlog: what waits in Postfix's queue
                    for each channel
admission           whether a mail's senders may write there; senders: who they are, and who is listed;
                    sender_checks: whether they are forged; marked: a warning in front of the text
gateway             the way of one mail
addresses           the address grammar: parse, fold, redact; address_book: all addresses of this Zulip
verdict             Delivered | Deferred | Refused, and how clients are told
journal             the SQLite file: every mail, its outcome, and all that is derived from it
pace                sliding windows over what Zulip has counted, shared between channels
outcome             what became of each mail inside Zulip, by its worker's log; worker_log: reads that;
                    late: what is told when nobody waits for it any longer
forgery             mail that would write into that log itself
automatic           automatic replies, and mail that goes in circles
message             a mail on the disk, and the header fields that only Zulip may set
postable            what Zulip would drop for want of text, made postable; mail_parts: the parts as
                    Zulip sees them; invitation: one as text; mime_structure: reads MIME in pieces
backend             which way into Zulip: backend_http (up to 10) or backend_smtp (11 and later)
wire_format         a mail as SMTP wants it; header_repair: as Zulip 11's mail server can take it in
quarantine          copies of refused mail, and of what Zulip has lost
failures            mail that failed inside Zulip after it was accepted
revival             Zulip 11's mail server that has lost its database
polling             takes mail out of an inbox; imap_session, oauth: its session and tokens;
                    recipient_field: to whom such a mail was sent; inbox_notes: what
                    outlives a restart; inbox_probe: whether mail comes in there; watchdog: systemd ends what hangs
config              gateway.conf and the credential file
migration           what earlier versions have left
files, deadline     files that are complete or not there, and those of others; how long something may take
                    as a whole
terminal            what strangers have written, shown on a terminal
status, doctor      what the operator is told (metrics, alerts: the same for Prometheus and in Zulip; probe: a mail of
                    our own, own_mail); what is wrong on this host (postfix_checks, certificate; finding, postfix)
cli                 the command line
"""

# As in galaxy.yml and CHANGELOG.md.
__version__ = "2.0.0"
