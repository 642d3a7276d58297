#!/bin/sh
# Removes the metrics that were written somewhere else than file $1, or that are to be written no longer (no $1):
# what stays would be shown as if it were true.
set -eu
unit=/etc/systemd/system/zulip-email-gateway-metrics.service
written=$(sed -n 's/^ExecStart=.* sh \(\/[^ ]*\)$/\1/p' "$unit")
[ "$written" != "${1:-}" ] || exit 0
systemctl --quiet stop zulip-email-gateway-metrics.timer zulip-email-gateway-metrics.service
rm -f "$written" "$written.new"
