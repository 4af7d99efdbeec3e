"""The evidence that a quantized network is as good as the float one: metrics, ledger, reports."""
