# PostgreSQL 18 in two zones. `orchestrator doctor` checks the parameters that matter for what an answer promises.

locals {
  # Those that RDS takes in its own units: kB, 8 kB pages and ms.
  parameters = {
    autovacuum_naptime                  = { value = "15", restart = false }
    autovacuum_vacuum_cost_limit        = { value = "2000", restart = false }
    checkpoint_timeout                  = { value = "900", restart = false }
    idle_in_transaction_session_timeout = { value = "300000", restart = false }
    jit                                 = { value = "0", restart = false }
    log_min_duration_statement          = { value = "1000", restart = false }
    max_connections                     = { value = tostring(var.database_max_connections), restart = true }
    max_wal_size                        = { value = "4096", restart = false }
    random_page_cost                    = { value = "1.1", restart = false }
    "rds.force_ssl"                     = { value = "1", restart = false }
    synchronous_commit                  = { value = "on", restart = false }
    autovacuum                          = { value = "1", restart = false }
    track_counts                        = { value = "1", restart = false }
    timezone                            = { value = "UTC", restart = false }
  }
}

resource "aws_db_parameter_group" "this" {
  name_prefix = "${local.name}-"
  family      = "postgres${split(".", var.database_version)[0]}"
  description = "What orchestrator doctor wants, and what many small transactions need"

  dynamic "parameter" {
    for_each = local.parameters

    content {
      name         = parameter.key
      value        = parameter.value.value
      apply_method = parameter.value.restart ? "pending-reboot" : "immediate"
    }
  }

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_db_subnet_group" "this" {
  name       = local.name
  subnet_ids = aws_subnet.private[*].id
}

resource "aws_kms_key" "this" {
  description             = "${local.name}: database, brokers, secrets and backups"
  enable_key_rotation     = true
  deletion_window_in_days = 30
}

resource "aws_db_instance" "this" {
  identifier     = local.name
  engine         = "postgres"
  engine_version = var.database_version
  instance_class = var.database_instance_class

  db_name  = "${replace(var.customer, "-", "_")}_events_db"
  username = "orchestrator"
  # Written and never kept: neither a plan nor the state holds it.
  password_wo         = var.database_password
  password_wo_version = var.secrets_version

  multi_az               = true
  db_subnet_group_name   = aws_db_subnet_group.this.name
  vpc_security_group_ids = [aws_security_group.database.id]
  publicly_accessible    = false
  parameter_group_name   = aws_db_parameter_group.this.name

  allocated_storage     = var.database_storage_gib
  max_allocated_storage = var.database_storage_gib * 4
  storage_type          = "gp3"
  storage_encrypted     = true
  kms_key_id            = aws_kms_key.this.arn

  # Any moment within these days can be restored (point-in-time recovery).
  backup_retention_period   = var.backup_retention_days
  backup_window             = "01:00-01:45"
  maintenance_window        = "sun:03:00-sun:04:00"
  copy_tags_to_snapshot     = true
  delete_automated_backups  = false
  skip_final_snapshot       = false
  final_snapshot_identifier = "${local.name}-final"
  deletion_protection       = var.deletion_protection

  auto_minor_version_upgrade      = true
  allow_major_version_upgrade     = false
  performance_insights_enabled    = true
  performance_insights_kms_key_id = aws_kms_key.this.arn
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]
}

resource "aws_db_instance" "replica" {
  count               = var.read_replica ? 1 : 0
  identifier          = "${local.name}-replica"
  replicate_source_db = aws_db_instance.this.identifier
  instance_class      = var.database_instance_class

  vpc_security_group_ids = [aws_security_group.database.id]
  publicly_accessible    = false
  parameter_group_name   = aws_db_parameter_group.this.name
  storage_encrypted      = true
  kms_key_id             = aws_kms_key.this.arn
  skip_final_snapshot    = true
  deletion_protection    = var.deletion_protection

  performance_insights_enabled    = true
  performance_insights_kms_key_id = aws_kms_key.this.arn
}
