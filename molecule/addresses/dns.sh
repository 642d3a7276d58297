#!/bin/sh
# What senders' domains say of their mail, on the DNS server that all test hosts ask; and the key that
# signed.example's mail is signed with.
set -eu
openssl genrsa -out /root/dkim.key 2048 2>/dev/null
key=$(openssl rsa -in /root/dkim.key -pubout -outform DER 2>/dev/null | base64 -w 0)
here=$(hostname -i)
cat > /etc/dnsmasq.d/senders.conf <<D
# Sends from here.
txt-record=passes.example,"v=spf1 ip4:$here -all"
txt-record=_dmarc.passes.example,"v=DMARC1; p=reject"
# Sends from elsewhere, signed.
txt-record=signed.example,"v=spf1 -all"
txt-record=_dmarc.signed.example,"v=DMARC1; p=reject"
txt-record=key._domainkey.signed.example,"v=DKIM1; p=$(echo "$key" | cut -c-200)","$(echo "$key" | cut -c201-)"
# Sends nothing from here, and asks for this or that.
txt-record=reject.example,"v=spf1 -all"
txt-record=_dmarc.reject.example,"v=DMARC1; p=reject"
txt-record=quarantine.example,"v=spf1 -all"
txt-record=_dmarc.quarantine.example,"v=DMARC1; p=quarantine"
txt-record=none.example,"v=spf1 -all"
txt-record=_dmarc.none.example,"v=DMARC1; p=none"
# What a domain says of those below it.
txt-record=_dmarc.example.com,"v=DMARC1; p=none; sp=reject"
# Has no DMARC.
txt-record=spf.example,"v=spf1 -all"
# Whose name servers are dead.
server=/dead.example/192.0.2.1
D
systemctl restart dnsmasq
