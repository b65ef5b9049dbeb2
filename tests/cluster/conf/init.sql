GRANT ALL ON *.* TO slurm@'127.0.0.1' IDENTIFIED BY '{password}';
