# What the pods read: one entry, called as the deployment, with the keys that the ExternalSecret asks for.

resource "aws_secretsmanager_secret" "orchestrator" {
  name       = local.name
  kms_key_id = aws_kms_key.this.key_id
}

resource "aws_secretsmanager_secret_version" "orchestrator" {
  secret_id = aws_secretsmanager_secret.orchestrator.id
  secret_string_wo = jsonencode({
    database-password = var.database_password
    kafka-password    = var.kafka_password
    webhook-secrets   = var.webhook_secrets
  })
  secret_string_wo_version = var.secrets_version
}

data "aws_iam_policy_document" "secrets" {
  statement {
    actions   = ["secretsmanager:GetSecretValue", "secretsmanager:DescribeSecret"]
    resources = [aws_secretsmanager_secret.orchestrator.arn]
  }

  statement {
    actions   = ["kms:Decrypt"]
    resources = [aws_kms_key.this.arn]
  }
}
