"""Deliver email into Zulip without losing any of it.

The package takes a mail at a door (Postfix's pipe(8) transport, an IMAP inbox,
the quarantine, Zulip's own list of failures), decides about the address, waits
for room within Zulip's rate limits, hands the mail over, and tells the truth
about the outcome. It needs Python 3.10 or later and the standard library only;
polling needs python3-imap-tools besides.

Modules, one job each:

addresses   the address grammar: parse, fold, redact
verdict     Delivered | Deferred | Refused, and how Postfix is told
config      gateway.conf and the credential file
state       one locked JSON file shared by all processes
worker      what Zulip's queue worker says about itself
pace        sliding windows over what that worker has consumed
headers     the header fields that only Zulip may set
backend     which way into Zulip: backend_http (up to 10) or backend_smtp (11 and later)
quarantine  copies of refused mail
delivery    the way of one mail through all of these
inbox       the door of polling; mailbox: its IMAP session, oauth: its access tokens,
            recipient: to whom a mail in an inbox was sent
recovery    mail that failed inside Zulip after it was accepted
status      what the operator is told; doctor: what is wrong on this host
cli         the command line
"""
