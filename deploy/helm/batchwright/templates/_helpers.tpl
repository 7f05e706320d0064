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

{{/* Labels of pods that use the data and are no servers: no service must select them. */}}
{{- define "batchwright.jobSelector" -}}
app.kubernetes.io/name: batchwright-job
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
{{- if kindIs "map" $value }}
{{ $key }}: {{- toYaml $value | nindent 2 }}
{{- else if not (kindIs "invalid" $value) }}
{{ $key }}: {{ int64 $value }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Specification of a pod that runs one command on the data: `root`, `args`, and `beside` the server. */}}
{{- define "batchwright.jobPod" -}}
{{- $ := .root -}}
restartPolicy: Never
serviceAccountName: {{ include "batchwright.name" $ }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "batchwright.podSecurity" $ | nindent 2 }}
{{- if .beside }}
# The volume of the data is attached to the node of the server alone.
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "batchwright.selector" $ | nindent 12 }}
{{- else }}
# It waits until the server has gone, which uses the data until its end.
affinity:
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels: {{- include "batchwright.selector" $ | nindent 12 }}
  {{- with ($.Values.affinity | default dict).nodeAffinity }}
  nodeAffinity: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with $.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: job
    image: {{ include "batchwright.image" $ }}
    imagePullPolicy: {{ $.Values.image.pullPolicy }}
    args: {{- toYaml .args | nindent 6 }}
    env:
      - {name: BATCHWRIGHT_CONFIG, value: /etc/batchwright/settings/batchwright.toml}
    securityContext: {{- include "batchwright.containerSecurity" $ | nindent 6 }}
    resources: {{- toYaml $.Values.backup.resources | nindent 6 }}
    volumeMounts:
      - {name: data, mountPath: /var/lib/batchwright}
      - {name: settings, mountPath: /etc/batchwright/settings, readOnly: true}
      {{- if $.Values.backup.existingClaim }}
      - {name: backup, mountPath: /backup}
      {{- end }}
volumes:
  - name: data
    persistentVolumeClaim:
      claimName: data-{{ include "batchwright.name" $ }}-0
  - name: settings
    configMap:
      name: {{ include "batchwright.name" $ }}-settings
  {{- with $.Values.backup.existingClaim }}
  - name: backup
    persistentVolumeClaim:
      claimName: {{ . | quote }}
  {{- end }}
{{- end -}}
