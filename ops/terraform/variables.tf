variable "region" {
  description = "Region of AWS."
  type        = string
  default     = "eu-central-1"

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: expected the name of a region such as eu-central-1."
  }
}

variable "customer" {
  description = "CUSTOMER_NAME of the deployment; it is in the name of everything made here."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}$", var.customer)) && !endswith(var.customer, "-") && !can(regex("--", var.customer))
    error_message = "customer: expected 2 to 20 lower-case letters, digits and single hyphens, a letter first, such as ocean."
  }
}

variable "vpc_cidr" {
  description = "Addresses of the network. The NetworkPolicy managed-services in ops/kubernetes names them too."
  type        = string
  default     = "10.20.0.0/16"

  validation {
    condition     = can(cidrsubnet(var.vpc_cidr, 4, 15)) && can(regex("/(1[6-9]|20)$", var.vpc_cidr))
    error_message = "vpc_cidr: expected a network of /16 to /20, such as 10.20.0.0/16."
  }
}

variable "database_instance_class" {
  description = "Class of the database's instances."
  type        = string
  default     = "db.m7g.xlarge"

  validation {
    condition     = can(regex("^db\\.[a-z0-9]+\\.[a-z0-9]+$", var.database_instance_class))
    error_message = "database_instance_class: expected a class such as db.m7g.xlarge."
  }
}

variable "database_version" {
  description = "Version of PostgreSQL, 18 or newer; the major alone is the newest of it that RDS has."
  type        = string
  default     = "18"

  validation {
    condition     = can(regex("^[0-9]+(\\.[0-9]+)?$", var.database_version)) && try(tonumber(split(".", var.database_version)[0]) >= 18, false)
    error_message = "database_version: expected PostgreSQL 18 or newer, such as 18."
  }
}

variable "database_storage_gib" {
  description = "Storage of the database at first, in GiB; it grows by itself to four times that."
  type        = number
  default     = 200

  validation {
    condition     = var.database_storage_gib >= 20 && var.database_storage_gib <= 16384 && floor(var.database_storage_gib) == var.database_storage_gib
    error_message = "database_storage_gib: expected a whole number from 20 to 16384."
  }
}

variable "database_max_connections" {
  description = "max_connections of the database; ops/kubernetes/README.md says what a customer needs."
  type        = number
  default     = 1000

  validation {
    condition     = var.database_max_connections >= 100 && var.database_max_connections <= 5000
    error_message = "database_max_connections: expected 100 to 5000."
  }
}

variable "read_replica" {
  description = "Whether to make a read replica, for DATABASE_READ_URL."
  type        = bool
  default     = false
}

variable "backup_retention_days" {
  description = "Days for which RDS can be restored to any moment. CloudNativePG has its own: retentionPolicy in ops/kubernetes."
  type        = number
  default     = 30

  validation {
    condition     = var.backup_retention_days >= 7 && var.backup_retention_days <= 35
    error_message = "backup_retention_days: expected 7 to 35; RDS keeps no more than 35."
  }
}

variable "kafka_version" {
  description = "Version of Kafka with KRaft, as MSK names it."
  type        = string
  default     = "3.9.x.kraft"

  validation {
    condition     = can(regex("\\.kraft$", var.kafka_version)) || can(regex("^[4-9]\\.", var.kafka_version))
    error_message = "kafka_version: expected a version with KRaft: one that ends in .kraft, or 4 and newer, which have nothing else."
  }
}

variable "kafka_instance_type" {
  description = "Type of the brokers."
  type        = string
  default     = "kafka.m7g.large"

  validation {
    condition     = can(regex("^kafka\\.(m5|m7g)\\.", var.kafka_instance_type))
    error_message = "kafka_instance_type: expected one that runs KRaft, such as kafka.m7g.large."
  }
}

variable "kubernetes_version" {
  description = "Version of Kubernetes."
  type        = string
  default     = "1.34"

  validation {
    # preStop.sleep and matchLabelKeys of pod affinity are on from here.
    condition     = try(tonumber(split(".", var.kubernetes_version)[1]) >= 31 && split(".", var.kubernetes_version)[0] == "1", false)
    error_message = "kubernetes_version: expected 1.31 or newer, which ops/kubernetes needs."
  }
}

variable "node_instance_types" {
  description = "Types of the nodes."
  type        = list(string)
  default     = ["m7g.xlarge"]

  validation {
    condition     = length(var.node_instance_types) > 0
    error_message = "node_instance_types: expected at least one type."
  }
}

variable "nodes" {
  description = "Least and most nodes; three zones want at least three."
  type        = object({ min = number, max = number })
  default     = { min = 3, max = 12 }

  validation {
    condition     = var.nodes.min >= 3 && var.nodes.max >= var.nodes.min
    error_message = "nodes: expected min of at least 3, one for each zone, and max of at least min."
  }
}

variable "api_server_networks" {
  description = "Networks from which people may call the Kubernetes API; empty: from inside the network only."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for network in var.api_server_networks : can(cidrhost(network, 0)) && network != "0.0.0.0/0"])
    error_message = "api_server_networks: expected networks such as 203.0.113.0/24, and not the whole internet."
  }
}

variable "deletion_protection" {
  description = "Whether the database refuses to be deleted. Turn it off only to take a trial down."
  type        = bool
  default     = true
}

variable "database_password" {
  description = "Password of the database's owner. No plan and no state holds it: give it as TF_VAR_database_password."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = can(regex("^[!-~]{16,128}$", var.database_password)) && !can(regex("[/@\"]", var.database_password))
    error_message = "database_password: expected 16 to 128 printable ASCII characters without / @ and quotes, as RDS wants them."
  }
}

variable "kafka_password" {
  description = "Password of the login to Kafka. No plan and no state holds it: give it as TF_VAR_kafka_password."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = can(regex("^[!-~]{16,128}$", var.kafka_password))
    error_message = "kafka_password: expected 16 to 128 printable ASCII characters."
  }
}

variable "webhook_secrets" {
  description = "WEBHOOK_SECRETS, the keys that sign deliveries. No plan and no state holds them: give them as TF_VAR_webhook_secrets."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = can(regex("^whsec_[A-Za-z0-9+/]{32,88}={0,2}(,whsec_[A-Za-z0-9+/]{32,88}={0,2})*$", var.webhook_secrets))
    error_message = "webhook_secrets: expected whsec_ followed by base64, several separated by commas."
  }
}

variable "secrets_version" {
  description = "Raise it by one to write changed secrets: Terraform cannot compare what it does not keep."
  type        = number
  default     = 1

  validation {
    condition     = var.secrets_version >= 1 && floor(var.secrets_version) == var.secrets_version
    error_message = "secrets_version: expected a whole number from 1."
  }
}
