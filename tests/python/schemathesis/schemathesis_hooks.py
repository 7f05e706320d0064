"""What the OpenAPI document cannot say: the idempotency key may stand in the header or in the body, but not a different one in each."""

import schemathesis


@schemathesis.hook
def filter_case(context, case):
    header = (case.headers or {}).get("idempotency-key")
    body = case.body.get("idempotency_key") if isinstance(case.body, dict) else None
    return header is None or body is None
