// Validates objects of the Prometheus operator, a JSON list on standard input, by its own schemas.
import { PrometheusRule } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule";
import { ServiceMonitor } from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor";
import { text } from "node:stream/consumers";

const kinds = { PrometheusRule, ServiceMonitor };
for (const object of JSON.parse(await text(process.stdin))) {
  new kinds[object.kind](object).validate();
}
