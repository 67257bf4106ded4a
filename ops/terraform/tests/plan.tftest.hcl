# Plans and applies without an account: the provider is a mock.

mock_provider "aws" {
  mock_data "aws_availability_zones" {
    defaults = { names = ["eu-central-1a", "eu-central-1b", "eu-central-1c", "eu-central-1d"] }
  }

  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }

  mock_resource "aws_eks_cluster" {
    defaults = {
      identity = [{ oidc = [{ issuer = "https://oidc.eks.eu-central-1.amazonaws.com/id/ABC" }] }]
    }
  }

  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::111122223333:role/mock" }
  }

  mock_resource "aws_iam_openid_connect_provider" {
    defaults = { arn = "arn:aws:iam::111122223333:oidc-provider/mock" }
  }

  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-central-1:111122223333:key/mock" }
  }

  mock_resource "aws_msk_cluster" {
    defaults = { arn = "arn:aws:kafka:eu-central-1:111122223333:cluster/mock" }
  }

  mock_resource "aws_msk_configuration" {
    defaults = { arn = "arn:aws:kafka:eu-central-1:111122223333:configuration/mock", latest_revision = 1 }
  }

  mock_resource "aws_secretsmanager_secret" {
    defaults = { arn = "arn:aws:secretsmanager:eu-central-1:111122223333:secret:mock" }
  }

  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }

  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::mock" }
  }
}

variables {
  customer          = "ocean"
  database_password = "0123456789abcdefghij"
  kafka_password    = "0123456789abcdefghij"
  webhook_secrets   = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
}

run "the_database_outlives_a_zone_and_a_mistake" {
  command = plan

  assert {
    condition     = aws_db_instance.this.engine == "postgres" && startswith(aws_db_instance.this.engine_version, "18")
    error_message = "expected PostgreSQL 18"
  }
  assert {
    condition     = aws_db_instance.this.multi_az && aws_db_instance.this.deletion_protection && !aws_db_instance.this.skip_final_snapshot
    error_message = "expected two zones, deletion protection and a last snapshot"
  }
  assert {
    condition     = aws_db_instance.this.backup_retention_period == 30
    error_message = "expected 30 days of point-in-time recovery"
  }
  assert {
    condition     = aws_db_instance.this.storage_encrypted && !aws_db_instance.this.publicly_accessible
    error_message = "expected encryption, and no public address"
  }
  assert {
    condition     = aws_db_instance.this.db_name == "ocean_events_db" && aws_db_instance.this.username == "orchestrator"
    error_message = "expected the names that ops/kubernetes uses"
  }
  assert {
    condition     = aws_db_parameter_group.this.family == "postgres18"
    error_message = "expected the family of the version"
  }
  assert {
    condition     = length(aws_db_instance.replica) == 0
    error_message = "expected no read replica unless it is asked for"
  }
}

run "a_read_replica_is_made_when_asked_for" {
  command = apply

  variables {
    read_replica = true
  }

  assert {
    condition     = aws_db_instance.replica[0].replicate_source_db == "event-scheduler-ocean"
    error_message = "expected a replica of the database"
  }
  assert {
    condition     = strcontains(output.database_read_url, "/ocean_events_db?sslmode=verify-full")
    error_message = "expected its address"
  }
}

run "kafka_runs_kraft_in_three_zones_with_logins" {
  command = plan

  assert {
    condition     = endswith(aws_msk_cluster.this.kafka_version, ".kraft") && aws_msk_cluster.this.number_of_broker_nodes == 3
    error_message = "expected KRaft and three brokers"
  }
  assert {
    condition     = aws_msk_cluster.this.encryption_info[0].encryption_in_transit[0].client_broker == "TLS"
    error_message = "expected TLS alone"
  }
  assert {
    condition     = aws_msk_cluster.this.client_authentication[0].sasl[0].scram && !aws_msk_cluster.this.client_authentication[0].unauthenticated
    error_message = "expected SCRAM, and nobody without a login"
  }
  assert {
    condition     = strcontains(aws_msk_configuration.this.server_properties, "auto.create.topics.enable=false") && strcontains(aws_msk_configuration.this.server_properties, "min.insync.replicas=2")
    error_message = "expected no topics by accident, and records on two brokers"
  }
  assert {
    condition     = aws_secretsmanager_secret.kafka.name == "AmazonMSK_event-scheduler-ocean"
    error_message = "expected the prefix that MSK demands"
  }
}

run "the_cluster_enforces_network_policies_and_hides_the_metadata" {
  command = plan

  assert {
    condition     = jsondecode(aws_eks_addon.network.configuration_values).enableNetworkPolicy == "true"
    error_message = "expected NetworkPolicies to have an effect"
  }
  assert {
    condition     = aws_launch_template.node.metadata_options[0].http_tokens == "required" && aws_launch_template.node.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "expected pods not to reach the metadata service"
  }
  assert {
    condition     = aws_eks_cluster.this.vpc_config[0].endpoint_private_access && !aws_eks_cluster.this.vpc_config[0].endpoint_public_access
    error_message = "expected the API server to be private"
  }
  assert {
    condition     = length(aws_subnet.private) == 3 && length(distinct(aws_subnet.private[*].availability_zone)) == 3
    error_message = "expected three zones"
  }
  assert {
    condition     = length(distinct(concat(aws_subnet.private[*].cidr_block, aws_subnet.public[*].cidr_block))) == 6
    error_message = "expected six networks that differ"
  }
}

run "only_the_pods_reach_the_database_and_the_brokers" {
  command = apply

  assert {
    condition     = aws_vpc_security_group_ingress_rule.database.from_port == 5432 && aws_vpc_security_group_ingress_rule.database.to_port == 5432 && aws_vpc_security_group_ingress_rule.database.cidr_ipv4 == null
    error_message = "expected the port of PostgreSQL, from a group and from no network"
  }
  assert {
    condition     = aws_vpc_security_group_ingress_rule.kafka.from_port == 9096 && aws_vpc_security_group_ingress_rule.kafka.cidr_ipv4 == null
    error_message = "expected the port of SASL_SSL, from a group and from no network"
  }
}

run "backups_are_private_and_no_age_ends_them" {
  command = plan

  assert {
    condition     = aws_s3_bucket_lifecycle_configuration.backup.rule[0].expiration[0].days == 0 && aws_s3_bucket_lifecycle_configuration.backup.rule[0].noncurrent_version_expiration[0].noncurrent_days == 7
    error_message = "expected a week for what was deleted, and no end for what was not"
  }
  assert {
    condition     = aws_s3_bucket_public_access_block.backup.block_public_acls && aws_s3_bucket_public_access_block.backup.restrict_public_buckets
    error_message = "expected a private bucket"
  }
}

run "the_service_accounts_are_those_of_the_overlay" {
  command = plan

  assert {
    condition     = local.service_accounts.secrets == "system:serviceaccount:event-scheduler-ocean:external-secrets"
    error_message = "expected the namespace and the account of components/secrets"
  }
  assert {
    condition     = aws_secretsmanager_secret.orchestrator.name == "event-scheduler-ocean"
    error_message = "expected the entry that the ExternalSecret asks for"
  }
  assert {
    condition     = local.service_accounts.backup == "system:serviceaccount:event-scheduler-ocean:postgres"
    error_message = "expected the account that CloudNativePG makes for the cluster called postgres"
  }
}

run "a_wrong_customer_is_refused" {
  command = plan

  variables {
    customer = "Ocean_1"
  }
  expect_failures = [var.customer]
}

run "an_old_postgresql_is_refused" {
  command = plan

  variables {
    database_version = "17.6"
  }
  expect_failures = [var.database_version]
}

run "kafka_with_zookeeper_is_refused" {
  command = plan

  variables {
    kafka_version = "3.6.0"
  }
  expect_failures = [var.kafka_version]
}

run "the_whole_internet_is_refused" {
  command = plan

  variables {
    api_server_networks = ["0.0.0.0/0"]
  }
  expect_failures = [var.api_server_networks]
}

run "short_secrets_are_refused" {
  command = plan

  variables {
    database_password = "short"
    kafka_password    = "short"
    webhook_secrets   = "whsec_x"
  }
  expect_failures = [var.database_password, var.kafka_password, var.webhook_secrets]
}

run "sizes_that_cannot_be_are_refused" {
  command = plan

  variables {
    database_storage_gib     = 5
    database_max_connections = 6000
    backup_retention_days    = 40
    nodes                    = { min = 1, max = 1 }
    vpc_cidr                 = "10.20.0.0/28"
    kubernetes_version       = "1.29"
    kafka_instance_type      = "kafka.t3.small"
    secrets_version          = 0
  }
  expect_failures = [
    var.database_storage_gib, var.database_max_connections, var.backup_retention_days, var.nodes, var.vpc_cidr,
    var.kubernetes_version, var.kafka_instance_type, var.secrets_version,
  ]
}
