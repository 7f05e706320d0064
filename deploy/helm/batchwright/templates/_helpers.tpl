{{- define "batchwright.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change, because selectors cannot. */}}
{{- define "batchwright.selector" -}}
app.kubernetes.io/name: batchwright
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "batchwright.backupSelector" -}}
app.kubernetes.io/name: batchwright-backup
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "batchwright.labels" -}}
{{ include "batchwright.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "batchwright.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The config file: settings of the user, and what the chart decides. */}}
{{- define "batchwright.config" -}}
{{- $server := dict
      "listen" "0.0.0.0:8080"
      "admin_listen" "0.0.0.0:8081"
      "first_admin_key" "env:ADMIN_KEY"
      "shutdown_delay" (printf "%ds" (int .Values.shutdown.delaySeconds)) -}}
{{- $shipped := "/usr/lib/batchwright/plugins" -}}
{{- $execution := dict "shutdown_grace" (printf "%ds" (int .Values.shutdown.graceSeconds)) -}}
{{- $fixed := dict
      "server" $server
      "storage" (dict "data" (printf "/var/lib/batchwright/%s" .Values.persistence.folder))
      "plugins" (dict
        "plugins" "/etc/batchwright/plugins"
        "components" (ternary (list $shipped "/plugins") (list $shipped) (not (empty .Values.pull))))
      "execution" $execution -}}
{{- mergeOverwrite (deepCopy .Values.settings) $fixed | toToml -}}
{{- end -}}

{{- define "batchwright.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "batchwright.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
# Else each start changes the group of every file, and compiled plugins are compiled again.
fsGroupChangePolicy: OnRootMismatch
{{- range $key, $value := .Values.securityContext }}
{{- if ne (kindOf $value) "invalid" }}
{{ $key }}: {{ int64 $value }}
{{- end }}
{{- end }}
{{- end -}}
