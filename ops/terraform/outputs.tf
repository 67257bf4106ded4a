output "database_url" {
  description = "DATABASE_URL for addresses.env of the overlay; the password comes from a file."
  value       = "postgresql://orchestrator@${aws_db_instance.this.address}:5432/${aws_db_instance.this.db_name}?sslmode=verify-full&sslrootcert=/etc/orchestrator/authorities/postgres.crt"
}

output "database_read_url" {
  description = "DATABASE_READ_URL, if there is a read replica."
  value       = try("postgresql://orchestrator@${aws_db_instance.replica[0].address}:5432/${aws_db_instance.this.db_name}?sslmode=verify-full&sslrootcert=/etc/orchestrator/authorities/postgres.crt", null)
}

output "kafka_bootstrap_servers" {
  description = "KAFKA_BOOTSTRAP_SERVERS for addresses.env of the overlay."
  value       = aws_msk_cluster.this.bootstrap_brokers_sasl_scram
}

output "kafka_sasl_username" {
  description = "KAFKA_SASL_USERNAME for addresses.env of the overlay."
  value       = local.name
}

output "secrets_role_arn" {
  description = "Role for the service account external-secrets (components/secrets/aws-secrets-manager)."
  value       = aws_iam_role.service["secrets"].arn
}

output "backup_role_arn" {
  description = "Role for CloudNativePG, if the database runs in the cluster: backup-role in the ConfigMap database of the overlay."
  value       = aws_iam_role.service["backup"].arn
}

output "backup_bucket" {
  description = "Bucket of its base backups and WAL: backup-bucket in the ConfigMap database of the overlay."
  value       = aws_s3_bucket.backup.bucket
}

output "kubeconfig_command" {
  description = "Lets kubectl reach the cluster."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${aws_eks_cluster.this.name}"
}
